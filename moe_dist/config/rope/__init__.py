"""Defines the ways to scale rotary frequencies. `kinds.py` has the keys and rules of each kind."""
