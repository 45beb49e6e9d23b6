"""Command line of the method: `app` holds the commands, one module each does the work."""
