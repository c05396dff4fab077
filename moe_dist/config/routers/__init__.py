"""Defines the kinds of routers. A kind has its keys, capabilities and rules."""
