"""Fingerprints equal a slow sum over the elements in Python integers, for every dtype and sharding."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from moe_dist.checkpoint import fingerprint as module
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal, signed

MOD = 1 << 64


def mix(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD % MOD
    x ^= x >> 33
    x = x * 0xC4CEB9FE1A85EC53 % MOD
    return x ^ x >> 33


def oracle(tensor: torch.Tensor, offsets: Sequence[int], shape: Sequence[int]) -> int:
    """Computes the fingerprint element by element."""
    size = tensor.element_size()
    raw = (
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else tensor.view(1).view(torch.uint8).numpy().tobytes()
    )
    total = 0
    for n, place in enumerate(itertools.product(*(range(length) for length in tensor.shape))):
        index = 0
        for at, offset, length in zip(place, offsets, shape, strict=True):
            index = index * length + at + offset
        bits = int.from_bytes(raw[n * size : (n + 1) * size], "little", signed=size > 1)
        total += mix((bits + (index + 1) * 0x9E3779B97F4A7C15) % MOD)
    return total % MOD


TENSORS = [
    torch.randn(5, 7, generator=torch.Generator().manual_seed(1)),
    torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    torch.tensor([float("nan"), float("-inf"), -0.0, 0.0]).bfloat16(),
    torch.tensor([[2**63 - 1, -(2**63)], [-1, 0]]),
    torch.tensor([0, 128, 255], dtype=torch.uint8),
    torch.tensor([True, False]),
    torch.tensor(3.5),
    torch.arange(12.0).view(3, 4).T,
    torch.zeros(0, 4),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}{tuple(t.shape)}")
def test_equals_the_slow_sum_and_leaves_the_tensor_alone(tensor: torch.Tensor) -> None:
    before = tensor.clone()
    assert fingerprint(tensor) == oracle(tensor, [0] * tensor.ndim, tensor.shape)
    assert before.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("block", [1 << 15, 7])
def test_pieces_add_up_to_the_whole_for_any_cut(monkeypatch: pytest.MonkeyPatch, dim: int, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    whole = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = oracle(whole, (0, 0, 0), whole.shape)
    assert fingerprint(whole) == expected
    for cuts in ((1,), (2, 3), (1, 2, 3)):
        edges = [0, *cuts, whole.shape[dim]]
        total = 0
        for begin, end in itertools.pairwise(edges):
            piece = whole.narrow(dim, begin, end - begin)
            offsets = [begin if d == dim else 0 for d in range(3)]
            part = fingerprint(piece, offsets=offsets, shape=whole.shape)
            assert part == oracle(piece, offsets, whole.shape)
            total += signed(part)
        assert hexadecimal(total) == hexadecimal(expected)


def test_every_flipped_bit_and_every_swap_changes_it() -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    seen = {fingerprint(tensor)}
    raw = tensor.numpy().tobytes()
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        seen.add(fingerprint(torch.from_numpy(np.frombuffer(damaged, np.float32).reshape(4, 6).copy())))
    flat = tensor.flatten()
    for a, b in itertools.combinations(range(flat.numel()), 2):
        swapped = flat.clone()
        swapped[a], swapped[b] = flat[b], flat[a]
        seen.add(fingerprint(swapped.view(4, 6)))
    assert len(seen) == 1 + 8 * len(raw) + math.comb(flat.numel(), 2)
    assert fingerprint(tensor.T) not in seen
