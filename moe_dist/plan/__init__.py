"""A run before it runs: its rules, placement, nodes, FLOPs and memory. Imports no torch."""
