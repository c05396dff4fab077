"""Checks and estimates a run before it starts: preflight, placement, nodes, FLOPs and memory. Imports no torch."""
