"""Defines the kinds of engines. Each kind has a file with its keys, requirements and rules."""
