"""The model families: a folder each, or a file; each is imported when it is asked for."""
