"""Checks and estimates a run before its start: preflight, placement, nodes, FLOPs and memory. Imports no torch."""
