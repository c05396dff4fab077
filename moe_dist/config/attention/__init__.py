"""Defines the kinds of attention. `kinds.py` has their keys, rules and costs of projections."""
