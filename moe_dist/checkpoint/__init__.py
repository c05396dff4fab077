"""Checkpoints: the state of a run under logical names, and its storage."""
