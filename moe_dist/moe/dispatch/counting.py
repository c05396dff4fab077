"""Orders made by counting: linear in what is ordered, whatever the number of keys. N items, Q pairs."""

import numpy as np
import torch
from torch import Tensor


def counting_order(key_N: Tensor, num_keys: int) -> Tensor:
    """int64 permutation that sorts int64 keys in [0, num_keys) and leaves equal keys in their order.

    One pass a byte of the key on every device: the host's by numpy, whose stable sort of short integers is a radix sort
    (torch's is one from 32,768 items on only), CUDA's by torch. Longer keys are ordered by their low and then by their high
    bits. Does not sync.
    """
    if num_keys > 1 << 15:
        low_N = counting_order(key_N & 0x7FFF, 1 << 15)
        return low_N[counting_order((key_N >> 15)[low_N], (num_keys - 1 >> 15) + 1)]
    short_N = key_N.to(torch.uint8 if num_keys <= 1 << 8 else torch.int16)
    return (_host_order if key_N.device.type == "cpu" else _device_order)(short_N)


def runs_in_order(start_X: Tensor, length_X: Tensor, total: int) -> Tensor:
    """int64 indices [total] of runs, one after the other: start, start + 1, ..., start + length - 1 of each.

    `total` is the sum of the lengths, known beforehand so that CUDA need not sync to learn it.
    """
    shift_X = start_X - (length_X.cumsum(0) - length_X)
    return spread(shift_X, length_X, total) + torch.arange(total, device=start_X.device)


def spread(value_X: Tensor, length_X: Tensor, total: int) -> Tensor:
    """Each value as often as its length says, [total]; does not sync."""
    return torch.repeat_interleave(value_X, length_X, output_size=total)


def compact(items_N: Tensor, keep_N: Tensor, num_kept: int) -> Tensor:
    """`items[keep]` in order, with the length known beforehand, so that CUDA need not sync to learn it."""
    kept = items_N.new_empty(num_kept + 1)
    target_N = torch.where(keep_N, keep_N.to(torch.int64).cumsum(0) - 1, num_kept)
    return kept.scatter_(0, target_N, items_N)[:num_kept]


def _host_order(short_N: Tensor) -> Tensor:
    return torch.from_numpy(np.argsort(short_N.numpy(), kind="stable"))


def _device_order(short_N: Tensor) -> Tensor:
    return torch.sort(short_N, stable=True).indices
