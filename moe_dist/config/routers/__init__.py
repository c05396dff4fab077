"""Defines the kinds of routers. Each kind has a file with its keys, capabilities and rules."""
