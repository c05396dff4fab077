"""Attention with sinks inside documents has the values and gradients of its formula, which is computed in float64 for one
token and head at a time."""

import pytest
import torch
from torch import Tensor

from moe_dist.model.attention import attend_with_sinks, dense_mask, flex_mask

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
WINDOW = 3


def drawn() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, 6, 5), (2, 2, 6, 5), (2, 2, 6, 5), (4,))  # four query heads share two key heads
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def by_loop(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for b in range(2):
        for h in range(4):
            for s in range(6):
                seen = [t for t in range(max(0, s - WINDOW + 1), s + 1) if DOCUMENTS[b, t] == DOCUMENTS[b, s]]
                weights = torch.stack([(q[b, h, s] @ k[b, h // 2, t]) * 5**-0.5 for t in seen]).exp()
                total = sinks[h].exp() + weights.sum()
                mixed = sum(weight * v[b, h // 2, t] for weight, t in zip(weights, seen, strict=True))
                out[b, h, s] = mixed / total  # pyright: ignore[reportOperatorIssue]
    return out


def test_equals_its_formula() -> None:
    weight, found = torch.randn(2, 4, 6, 5, dtype=torch.float64), []
    mask = dense_mask(DOCUMENTS, POSITIONS, WINDOW)
    for attend in (lambda *inputs: attend_with_sinks(*inputs, mask), by_loop):
        inputs = drawn()
        out = attend(*inputs)
        found.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_gives_the_same() -> None:
    inputs = [each.float() for each in drawn()]
    found = attend_with_sinks(*inputs, flex_mask(DOCUMENTS, POSITIONS, WINDOW))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(found, by_loop(*inputs), rtol=1e-5, atol=1e-5)  # pyright: ignore[reportCallIssue]
