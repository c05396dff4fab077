"""Calls collectives over process groups, and counts the bytes sent. `parallel/mesh.py` makes the process groups."""
