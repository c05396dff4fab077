"""The kinds of expert. Each kind has a file with its keys, properties and rules."""
