"""Routers, one in each file."""
