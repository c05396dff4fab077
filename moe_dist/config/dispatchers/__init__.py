"""Defines the kinds of dispatchers. `kinds.py` has their keys, requirements and rules."""
