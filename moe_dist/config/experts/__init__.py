"""Defines the kinds of experts. Each kind has a file with its keys, properties and rules."""
