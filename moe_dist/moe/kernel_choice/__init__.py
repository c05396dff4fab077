"""Chooses Triton or torch kernels, after a trial of the Triton kernels on this machine."""
