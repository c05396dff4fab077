"""Defines the kinds of optimizers. `kinds.py` has the keys and rules of each kind."""
