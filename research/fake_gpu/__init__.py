"""Simulates CUDA tensors without a GPU, and counts the operations of a training step on these tensors."""
