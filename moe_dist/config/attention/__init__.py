"""Defines the kinds of attention. `kinds.py` has the keys and rules of each, and the sizes of its projections."""
