"""Defines the kinds of sinks, which show or store a run's records. `kinds.py` has the keys and rules of each."""
