"""Defines the kinds of dispatchers. Each kind has a file with its keys, requirements and rules."""
