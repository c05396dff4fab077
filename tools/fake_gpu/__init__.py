"""Fake CUDA tensors and the counts of a training step on them, without a GPU."""
