"""Checks kernels, layers and training steps on the GPUs of this machine, and measures them (docs/gpu.md)."""
