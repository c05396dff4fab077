"""Routers. Each file has one kind."""
