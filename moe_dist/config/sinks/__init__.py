"""Defines the kinds of sinks, which show or store a run's records. Each kind has a file with its keys and rules."""
