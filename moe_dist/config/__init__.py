"""Configuration: the schema of a run and of a data set, loading with overrides, and its explanation. Imports no torch."""
