"""Collectives as differentiable, counted operations on process groups and tensors; the groups are made elsewhere."""
