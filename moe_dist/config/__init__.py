"""Configuration: the schemas of a run and of a data set, loading with overrides, and explanations. Imports no torch."""
