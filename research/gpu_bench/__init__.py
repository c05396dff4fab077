"""Measures kernels and layers on a GPU, and compares layers and steps with other implementations."""
