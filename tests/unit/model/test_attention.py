"""Attention is causal, stays inside documents, and supports grouped heads and sinks. With dense and with flex masks its
results equal a loop's."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.model import attention
from moe_dist.model.attention import attend, attend_with_sinks, dense_mask, flex_mask

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def by_loop(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, *, window: int = 99) -> Tensor:
    out = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                near = range(max(0, i + 1 - window), i + 1)
                seen = [j for j in near if DOCUMENTS[b, i] == DOCUMENTS[b, j]]
                weights = torch.stack([q[b, h, i] @ k[b, h // share, j] for j in seen]).div(q.shape[-1] ** 0.5).exp()
                total = weights.sum() if sinks is None else weights.sum() + sinks[h].exp()
                out[b, h, i] = sum(w * v[b, h // share, j] for w, j in zip(weights, seen, strict=True)) / total
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU it is not compiled
@pytest.mark.parametrize("make_mask", [dense_mask, flex_mask])
@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (4, None), (2, 1), (2, 2), (2, 6)])
@pytest.mark.slow
def test_equals_a_loop_over_what_each_token_may_see(make_mask: object, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8)
    k, v = torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)
    got = attend(q, k, v, make_mask(DOCUMENTS, POSITIONS, window))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(got, by_loop(q, k, v, window=window or 99), rtol=1e-5, atol=1e-5)


def with_sinks() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 4, 6, 5), (2, 2, 6, 5), (2, 2, 6, 5), (4,))  # four query heads share two key heads
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_sinks_have_the_values_and_gradients_of_the_loop() -> None:
    weight, found = torch.randn(2, 4, 6, 5, dtype=torch.float64), []
    mask = dense_mask(DOCUMENTS, POSITIONS, 3)
    for function in (lambda *inputs: attend_with_sinks(*inputs, mask), partial(by_loop, window=3)):
        inputs = with_sinks()
        out = function(*inputs)
        found.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_with_sinks_gives_the_same() -> None:
    inputs = [each.float() for each in with_sinks()]
    found = attend_with_sinks(*inputs, flex_mask(DOCUMENTS, POSITIONS, 3))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(found, by_loop(*inputs, window=3), rtol=1e-5, atol=1e-5)


def test_more_shapes_than_torch_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixture of depths needs 8 shapes in evaluation, and further shapes in training. Beyond torch's limit of 8
    recompilations, flex attention would silently run uncompiled, with S x S scores."""
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    with torch._dynamo.config.patch(recompile_limit=8):  # restores the limit; pytest's monkeypatch would not
        function = attention._compiled(doubled)
        for length in range(2, 14):
            function(torch.ones(length))
    assert len(compiled) == 12
