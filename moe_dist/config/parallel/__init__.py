"""The layout of a run over its ranks."""
