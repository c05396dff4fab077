"""The kinds of dispatcher. Each kind has a file with its keys, requirements and rules."""
