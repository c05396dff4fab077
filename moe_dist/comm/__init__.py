"""Collectives over process groups, with counts of their bytes. `parallel/mesh.py` makes the groups."""
