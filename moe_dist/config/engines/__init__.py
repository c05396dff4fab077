"""The kinds of engine. Each kind has a file with its keys, requirements and rules."""
