"""Collectives over process groups, and counts of the bytes that they send. `parallel/mesh.py` makes the process groups."""
