"""The kinds of router. Each kind has a file with its keys, capabilities and rules."""
