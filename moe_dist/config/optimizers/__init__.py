"""Defines the kinds of optimizers. Each kind has a file with its keys and rules."""
