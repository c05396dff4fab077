"""Writes and reads the trace of a run: each token's experts, by rank (docs/monitoring.md has the format)."""
