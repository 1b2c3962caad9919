"""The command line: one file per noun; each command parses, loads, calls, prints."""
