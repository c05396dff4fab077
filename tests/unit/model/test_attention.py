"""Attention is causal, stays inside documents, and supports grouped heads. With dense and with flex masks it equals a
loop."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.model import attention
from moe_dist.model.attention import attend, dense_mask, flex_mask

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def by_loop(q: Tensor, k: Tensor, v: Tensor, documents_BS: Tensor, window: int = 99) -> Tensor:
    out = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                near = range(max(0, i + 1 - window), i + 1)
                seen = [j for j in near if documents_BS[b, i] == documents_BS[b, j]]
                scores = torch.stack([q[b, h, i] @ k[b, h // share, j] for j in seen]) / q.shape[-1] ** 0.5
                out[b, h, i] = sum(p * v[b, h // share, j] for p, j in zip(scores.softmax(0), seen, strict=True))
    return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # on a CPU
@pytest.mark.parametrize("make_mask", [dense_mask, flex_mask])
@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, None), (4, None), (2, 1), (2, 2), (2, 6)])
def test_equals_a_loop_over_what_each_token_may_see(make_mask: object, kv_heads: int, window: int | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8)
    k, v = torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)
    got = attend(q, k, v, make_mask(DOCUMENTS, POSITIONS, window))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(got, by_loop(q, k, v, DOCUMENTS, window or 99), rtol=1e-5, atol=1e-5)


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
