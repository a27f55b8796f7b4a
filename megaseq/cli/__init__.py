"""The `megaseq` command; nothing else in the package reads the command line."""
