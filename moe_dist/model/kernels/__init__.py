"""Kernels of the dense parts of a transformer: norms, rotary embedding and cross entropy."""
