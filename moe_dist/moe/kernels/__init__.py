"""Arithmetic on rows: by torch on any device, and by Triton kernels on CUDA."""
