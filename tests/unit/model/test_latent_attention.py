"""Latent attention inside documents has the values and gradients of its formula, which is computed in float64 for one token
and head at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.model.attention import dense_mask
from moe_dist.model.cache import LayerCache
from moe_dist.model.latent_attention import EPS, LatentAttention
from moe_dist.model.layers import ModelArgs, rotary_table, rotate
from moe_dist.model.rope import YarnScaling

HEADS, WIDTH, ROTATED, VALUE, DIM = 3, 7, 4, 5, 16
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
YARN = YarnScaling(4.0, 4, mscale=0.7, mscale_all_dim=1.3)


def made(q_rank: int | None, *, scaled: bool = False, **options: Any) -> LatentAttention:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1, "hidden_dim": DIM, "num_layers": 1, "num_heads": HEADS, "num_kv_heads": HEADS}
    args = ModelArgs(**sizes, head_dim=WIDTH, rope_dim=ROTATED, moe_layers=(), compute_dtype=torch.float64, **options)
    module = LatentAttention(args, q_rank=q_rank, kv_rank=6, value_dim=VALUE, scaled=scaled).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def normed(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def by_loop(
    module: LatentAttention, x: Tensor, table: tuple[Tensor, Tensor], scale: float, factors: tuple[float, float]
) -> Tensor:
    weights, (q_factor, kv_factor) = dict(module.named_parameters()), factors
    batch, length, _ = x.shape
    out = torch.zeros_like(x)
    for b in range(batch):

        def turned(part: Tensor, at: int, b: int = b) -> Tensor:
            return rotate(part[None, None, None], tuple(each[b : b + 1, :, at : at + 1] for each in table))[0, 0, 0]  # pyright: ignore

        queries, keys, values = [], [], []
        for s in range(length):
            h = normed(x[b, s], weights["norm.weight"], 1e-5)
            if "q.weight" in weights:
                q = weights["q.weight"] @ h
            else:
                q = weights["q_up.weight"] @ (q_factor * normed(weights["q_down.weight"] @ h, weights["q_norm.weight"]))
            both = weights["kv_down.weight"] @ h
            kv = (weights["kv_up.weight"] @ (kv_factor * normed(both[:6], weights["kv_norm.weight"]))).view(HEADS, -1)
            key, plain = turned(both[6:], s), WIDTH - ROTATED
            queries.append([torch.cat([each[:plain], turned(each[plain:], s)]) for each in q.view(HEADS, WIDTH)])
            keys.append([torch.cat([each[:plain], key]) for each in kv])
            values.append([each[plain:] for each in kv])
        for s in range(length):
            seen = [t for t in range(s + 1) if DOCUMENTS[b, t] == DOCUMENTS[b, s]]
            heads = []
            for i in range(HEADS):
                shares = (torch.stack([queries[s][i] @ keys[t][i] for t in seen]) * scale).softmax(0)
                heads.append(sum(share * values[t][i] for share, t in zip(shares, seen, strict=True)))
            out[b, s] = weights["o.weight"] @ torch.cat(heads)
    return out


@pytest.mark.parametrize(
    ("q_rank", "scaling", "recompute", "factors"),
    [(None, None, False, (1.0, 1.0)), (8, YARN, True, (1.0, 1.0)), (8, None, False, ((DIM / 8) ** 0.5, (DIM / 6) ** 0.5))],
)
def test_equals_its_formula(
    q_rank: int | None, scaling: YarnScaling | None, recompute: bool, factors: tuple[float, float]
) -> None:
    module = made(q_rank, scaled=factors != (1.0, 1.0), rope_scaling=scaling, recompute_blocks=recompute)
    table = rotary_table(POSITIONS, ROTATED, 1e4, scaling)
    x = torch.randn(2, 6, DIM, dtype=torch.float64, requires_grad=True)
    scale = WIDTH**-0.5 * ((0.1 * 1.3 * torch.tensor(4.0).double().log().item() + 1) ** 2 if scaling else 1.0)
    weight = torch.randn(2, 6, DIM, dtype=torch.float64)
    found = []
    for out in (module(x, table, dense_mask(DOCUMENTS)), by_loop(module, x, table, scale, factors)):
        parameters = {"x": x, **dict(module.named_parameters())}
        found.append((out, torch.autograd.grad((out * weight).sum(), list(parameters.values()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert F.mse_loss(found[1][0], torch.zeros_like(x)) > 0.1


@torch.no_grad()
def test_a_cache_keeps_latents_and_gives_the_same() -> None:
    module = made(None, rope_pairs="adjacent")
    x, positions = torch.randn(1, 6, DIM, dtype=torch.float64), torch.arange(6)[None]
    expected = module(x, rotary_table(positions, ROTATED, 1e4), dense_mask(torch.zeros(1, 6)))
    cache = LayerCache(module.entry, batch=1, max_tokens=6, dtype=torch.float64, device=x.device)
    parts = [
        module.with_cache(part, rotary_table(at, ROTATED, 1e4), at, torch.ones_like(at, dtype=torch.bool), cache)
        for part, at in zip(x.split((4, 2), 1), positions.split((4, 2), 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-9, atol=1e-9)
    assert cache.keys.shape[1::2] + cache.values.shape[1::2] == (1, ROTATED, 1, 6)
