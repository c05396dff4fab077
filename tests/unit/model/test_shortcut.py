"""With a shortcut, the output of routed experts is added after the next layer. Values and gradients equal the formula in
float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.model.attention import make_mask
from moe_dist.model.layers import rotary_table
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from tests.support.tiny import tiny_config

CHANGES: dict[str, Any] = {
    "model.num_layers": 4, "model.moe.every": 2, "model.moe.shortcut": True, "model.moe.shared_ffn_dim": 12,
    "model.dense_ffn_dim": 20, "model.moe.groups": {"all": {"num_experts": 4, "num_null": 2, "num_identity": 2, "top_k": 3,
                                                            "ffn_dim": 16, "modalities": ["text", "image"]}},
}  # fmt: skip


def made(recompute: str) -> Transformer:
    config = tiny_config(Path("none"), Path("runs"), CHANGES | {"parallel.recompute": recompute})
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=1, token_mix={})
    model = build_model(config, placement, ep_rank=0, ep_group=None, compute_dtype=torch.float64).double()
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=3, std=0.3)
    return model


def by_formula(model: Transformer, ids: Tensor) -> Tensor:
    zeros, positions = torch.zeros_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    rotary, mask = rotary_table(positions, model.args.head_dim, model.args.rope_base), make_mask(zeros)
    x, late = F.embedding(ids, model.embedding.weight), torch.zeros(())
    for index, layer in enumerate(model.layers):
        a = x + layer.attention(x, rotary, mask)  # pyright: ignore
        if index % 2:
            x = a + layer.ffn(a) + late  # pyright: ignore
            continue
        moe: Any = layer.moe
        moe.shortcut = False  # now the layer returns the sum of shared and routed experts
        now = moe.shared(moe.norm(a))
        late = moe(a.flatten(0, 1), zeros.flatten())[0].view_as(a) - now
        x = a + now
        moe.shortcut = True
    return F.linear(model.norm(x), model.output.weight)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_experts_are_added_behind_the_next_layer(recompute: str) -> None:
    model, ids = made(recompute), torch.arange(18).view(2, 9)
    zeros, positions = torch.zeros_like(ids), torch.arange(9).expand_as(ids)
    weight = torch.randn(2, 9, model.args.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, reports = model(ids, positions, zeros, zeros)
    assert [report.late_TD for report in reports] == [None, None]  # reports must not keep a layer's output in memory
    parameters = list(model.parameters())
    found = torch.autograd.grad((ours * weight).sum(), parameters)
    theirs = by_formula(model, ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad((theirs * weight).sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    model.eval()
    with torch.no_grad():
        cache = model.make_cache(2, 9)
        parts = [
            model.forward_cached(part, at, torch.zeros_like(part), cache)
            for part, at in zip(ids.split((5, 4), 1), positions.split((5, 4), 1), strict=True)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), ours, rtol=1e-9, atol=1e-9)
