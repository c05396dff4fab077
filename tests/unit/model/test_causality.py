"""In evaluation no output and no choice of experts depends on a later token, for every router. A second test proves
that such a dependence would be detected."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import choice_of_training
from moe_dist.moe.routing.types import ABSENT
from tests.support.causal_models import evaluated_model
from tests.support.layouts import IMAGE, SEQ_LEN, Layout, config_of

ROUTERS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "top_k with nulls": (Layout(), {}),
    "top_k, zero-computation experts, capacity": (Layout(free=True, capacity=0.5), {}),
    "top_k, one logit for all nulls": (Layout(null_logit="single"), {}),
    "top_k, weights over all true experts": (Layout(), {"normalise": "true_all"}),
    "top_k, bias of a controller": (Layout(balance=True), {}),
    "group_limited": (Layout(limited=True, balance=True), {}),
    "threshold": (Layout(choice="rank"), {"causal": "threshold"}),
    "threshold, softmax": (Layout(choice="rank"), {"causal": "threshold", "score": "softmax"}),
    "auxiliary": (Layout(choice="rank"), {"causal": "auxiliary"}),
    "expert_threshold": (Layout(choice="rank", adaptive="expert_threshold"), {}),
    "expert_threshold, softmax": (Layout(choice="rank", adaptive="expert_threshold"), {"score": "softmax"}),
    **{f"router {kind}": (Layout(adaptive=kind, free=True), {}) for kind in ("top_p", "relu", "threshold", "predicted_k")},
    "gating_residual": (Layout(form="gating_residual", free=True), {}),
    **{
        f"depths, {causal}": (Layout(mixture_of_depths="rank", depth_causal=causal), {})
        for causal in ("threshold", "auxiliary")
    },
    "threshold, under depths": (Layout(choice="rank", mixture_of_depths="rank"), {"causal": "threshold"}),
    "auxiliary, under depths": (
        Layout(choice="rank", mixture_of_depths="rank", depth_causal="auxiliary"),
        {"causal": "auxiliary"},
    ),
}
EXACT = 1e-5


def model_of(name: str) -> Transformer:
    layout, router = ROUTERS[name]
    config = config_of(layout)
    values = config.model_dump(mode="json")
    inherited = {} if "kind" in router else values["model"]["moe"]["router"]
    values["model"]["moe"]["router"] = {**inherited, **router}
    return evaluated_model(Config.model_validate_json(json.dumps(values)))


@torch.no_grad()
def seen(model: Transformer, tokens_BS: Tensor, group_BS: Tensor) -> tuple[Tensor, list[set[tuple[int, int]]]]:
    """Returns logits [B, S, V], and the (token, expert) pairs of each layer."""
    pairs: list[set[tuple[int, int]]] = []
    slots: list[Tensor] = []  # selected tokens of the current mixture-of-depths layer

    def note_slots(_module: Any, _inputs: Any, chosen: Any) -> None:
        slots.append(chosen.index_C)

    def note(_module: Any, _inputs: Any, routing: Any) -> None:
        taken = routing.assignments
        kept = taken.expert_N != ABSENT
        token_N = slots.pop()[taken.token_N] if slots else taken.token_N
        pairs.append(set(zip(token_N[kept].tolist(), taken.expert_N[kept].tolist(), strict=True)))

    hooks = [router.register_forward_hook(note_slots) for router in model.depth_routers()]
    hooks += [layer.router.register_forward_hook(note) for layer in model.moe_modules()]
    positions = torch.arange(SEQ_LEN).expand_as(tokens_BS)
    logits, _ = model(tokens_BS, positions, torch.zeros_like(tokens_BS, dtype=torch.int32), group_BS)
    for hook in hooks:
        hook.remove()
    return logits, pairs


def leak(model: Transformer) -> tuple[float, int]:
    """For each position, changes all tokens from this position on. Returns the largest change of an earlier output, and
    the number of changed earlier pairs."""
    generator = torch.Generator().manual_seed(0)
    worst, changed = 0.0, 0
    tokens_BS = torch.randint(0, IMAGE[1], (2, SEQ_LEN), generator=generator)
    group_BS = (tokens_BS >= IMAGE[0]).long()
    logits, pairs = seen(model, tokens_BS, group_BS)
    assert all(any(layer) for layer in pairs)
    for first in range(1, SEQ_LEN):
        later_BS = tokens_BS.clone()
        later_BS[:, first:] = torch.randint(0, IMAGE[1], (2, SEQ_LEN - first), generator=generator)
        groups_BS = (later_BS >= IMAGE[0]).long()  # the later tokens' modalities change as well
        groups_BS[:, -1] = -1  # the last token is padding
        other_logits, other_pairs = seen(model, later_BS, groups_BS)
        worst = max(worst, float((logits - other_logits)[:, :first].abs().max()))
        for ours, theirs in zip(pairs, other_pairs, strict=True):
            earlier = [{pair for pair in each if pair[0] % SEQ_LEN < first} for each in (ours, theirs)]
            changed += len(earlier[0] ^ earlier[1])
    return worst, changed


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.slow
def test_later_tokens_change_nothing_earlier(name: str) -> None:
    worst, changed = leak(model_of(name))
    assert worst <= EXACT
    assert changed == 0


def test_the_choice_of_training_is_seen_to_look_ahead() -> None:
    model = model_of("threshold")
    with choice_of_training([layer.router for layer in model.moe_modules()], 0):
        worst, changed = leak(model)
    assert worst > 1e-2
    assert changed > 0
