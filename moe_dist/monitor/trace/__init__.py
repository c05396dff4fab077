"""The trace of a run: each token's experts, written by every rank (docs/monitoring.md has the format)."""
