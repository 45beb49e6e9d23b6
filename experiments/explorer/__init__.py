"""The collapse explorer: runs that are started, paused, changed and compared by hand, each in a process of its own (`run`), and shown live."""
