"""The collapse explorer: runs that are started, paused, changed and compared by hand, each trained in a process of its
own (`run`)."""
