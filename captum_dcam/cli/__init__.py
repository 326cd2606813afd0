"""The command line: one file a command, options declared once beside each."""
