"""Each MoE layer gets the previous MoE layer's router logits, in the forward pass, in recomputation and with a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config.schema import Config
from moe_dist.model.attention import make_mask
from moe_dist.model.layers import rotary_table
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.parallel.initialise import initialise
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from tests.support.tiny import IMAGE_IDS, tiny_config

CHANGES: dict[str, Any] = {  # MoE layers 1, 3 and 5, with dense layers between them
    "model.num_layers": 6, "model.moe.every": 2, "model.moe.first": 1, "model.dense_ffn_dim": 20,
    "model.moe.router": {"kind": "gating_residual", "normalise": "none"}, "placement": {"policy": "interleaved"},
}  # fmt: skip


def config(**changes: Any) -> Config:
    return tiny_config(
        Path("none"), Path("runs"), CHANGES | {key.replace("__", "."): each for key, each in changes.items()}
    )


def made(recompute: str = "none") -> Transformer:
    found = config(parallel__recompute=recompute)
    placement = make_placement(found.placement, expert_groups(found.model.moe), num_ranks=1, token_mix={})
    model = build_model(found, placement, ep_rank=0, ep_group=None, compute_dtype=torch.float64).double()
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=3, std=0.3)
    return model


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Returns token ids of both modalities, positions and groups. The last token is padding."""
    ids = torch.randint(4, IMAGE_IDS[1], (2, 9), generator=torch.Generator().manual_seed(0))
    group = (ids >= IMAGE_IDS[0]).long()
    group[1, -1] = -1
    return ids, torch.arange(9).expand_as(ids), group


def by_hand(model: Transformer, ids: Tensor, positions: Tensor, group: Tensor) -> Tensor:
    """Runs the layers one by one, and computes each layer's logits from its router rows and its residual."""
    rotary, mask = rotary_table(positions, model.args.head_dim, model.args.rope_base), make_mask(torch.zeros_like(ids))
    x, previous = F.embedding(ids, model.embedding.weight), None
    for layer in model.layers:
        x = x + layer.attention(x, rotary, mask)  # pyright: ignore
        if not layer.has_experts:
            x = x + layer.ffn(x)  # pyright: ignore
            continue
        moe: Any = layer.moe
        y, _ = moe(x.flatten(0, 1), group.flatten(), RoutingRequest(previous_TC=previous))
        logits = moe.router._logits(moe.norm(x).flatten(0, 1))
        if previous is not None:
            logits = logits + moe.router._mapped(previous)
        previous, x = logits, x + y.view_as(x)
    return F.linear(model.norm(x), model.output.weight)


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_logits_reach_the_next_moe_layer_and_gradients_come_back(recompute: str) -> None:
    model, (ids, positions, group) = made(recompute), batch()
    ours, reports = model(ids, positions, torch.zeros_like(ids), group)
    assert [report.logits_TC for report in reports] == [None] * 3, "no layer's logits live as long as the reports"
    theirs = by_hand(made(), ids, positions, group)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = made()
    expected = torch.autograd.grad((by_hand(plain, ids, positions, group) * weight).sum(), list(plain.parameters()))
    found = torch.autograd.grad((ours * weight).sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    moved = {name for (name, _), each in zip(model.named_parameters(), found, strict=True) if each.abs().max() > 1e-6}
    assert len([name for name in moved if name.endswith("residual")]) == 4, "two layers of two groups"


@torch.no_grad()
def test_generation_with_a_cache_is_the_forward() -> None:
    model, (ids, positions, group) = made().eval(), batch()
    whole, _ = model(ids, positions, torch.zeros_like(ids), group)
    cache = model.make_cache(2, 9)
    parts = [
        model.forward_cached(*part, cache)
        for part in zip(ids.split((5, 1, 3), 1), positions.split((5, 1, 3), 1), group.split((5, 1, 3), 1), strict=True)
    ]
    real = group >= 0
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-9, atol=1e-9)
