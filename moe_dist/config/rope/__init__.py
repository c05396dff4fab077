"""Defines the ways to scale rotary frequencies. Each kind has a file with its keys and rules."""
