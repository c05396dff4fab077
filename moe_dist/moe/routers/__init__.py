"""Routers, one a file: who goes where."""
