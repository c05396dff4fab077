"""Draws a tensor of a model from (seed, logical name)."""

import hashlib

import torch
from torch import Tensor


def normal_tensor(name: str, shape: tuple[int, ...], *, seed: int, std: float) -> Tensor:
    """Returns the initial fp32 tensor for a logical name. Its numbers are normal with `std`, and depend on (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()  # Python's hash() differs in each process
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # a seed must be below 2^63
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
