"""Checks and estimates before a run: preflight, placement, nodes, FLOPs and memory. Imports no torch."""
