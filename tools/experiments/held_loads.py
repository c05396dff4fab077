"""Sets a trained model's load to the budget of its load controllers, on held-out sequences that no table measures.

A controller holds the mean number of true experts per token in training. On held-out tokens the trained model may take
another number: the last biases follow the noise of the last steps, and unfamiliar tokens have other scores. So in each
layer one number is added to the biases of all true experts of a group. Bisection finds the number with which the group's
tokens take the target; only tokens with a label count, as in the tables. Layers are set in order, because a layer changes
the inputs of later layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing import Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.loss import forward

FARTHEST = 64.0  # largest shift; beyond any logit or probability
HALVINGS = 24  # end at a width of 1e-5


class Call(NamedTuple):
    """The arguments of a router for the tokens of one batch, and whether each token has a label."""

    h_TD: Tensor
    group_T: Tensor
    cache: RoutingCache
    scored_T: Tensor


@torch.no_grad()
def hold_loads(
    model: Transformer, batches: Sequence[Batch], targets: Mapping[str, float], group_of_modality: Tensor
) -> None:
    """Shifts the biases in place, for one rank that holds all experts. Groups without target or without token stay."""
    for layer in model.moe_modules() if targets else ():
        router: Any = layer.router
        calls = _calls(model, router, batches, group_of_modality)
        for index, group in enumerate(router.groups):
            if group.name in targets:
                _shift(router, calls, index, group, targets[group.name])


def _calls(model: Transformer, router: Any, batches: Sequence[Batch], group_of_modality: Tensor) -> list[Call]:
    """Returns the arguments of the router in a forward of each batch."""
    seen: list[tuple[Tensor, Tensor, RoutingCache]] = []
    calls: list[Call] = []

    def note(module: nn.Module, arguments: tuple[Tensor, Tensor, RoutingCache]) -> None:
        del module
        h_TD, group_T, cache = arguments
        seen.append((h_TD, group_T, replace(cache)))  # a copy, because the router writes its choices into the cache

    with router.register_forward_pre_hook(note):
        for batch in batches:
            forward(model, batch, group_of_modality)
            calls.append(Call(*seen.pop(), (batch.labels_BS != IGNORED).flatten()))
    return calls


def _shift(router: Any, calls: Sequence[Call], index: int, group: ExpertGroup, target: float) -> None:
    tokens = sum(int(((each.group_T == index) & each.scored_T).sum()) for each in calls)
    if not tokens:
        return
    bias_n = router.gate(group).bias[: group.num_experts]
    before_n, low, high = bias_n.clone(), -FARTHEST, FARTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        bias_n.copy_(before_n + middle)
        taken = sum(_taken(router, each, index) for each in calls)
        low, high = (middle, high) if taken < target * tokens else (low, middle)
    bias_n.copy_(before_n + high)


def _taken(router: Any, call: Call, index: int) -> int:
    """Returns the number of (token, true expert) pairs of a group's tokens that have a label."""
    routing: Routing = router(call.h_TD, call.group_T, replace(call.cache))
    token_N = routing.assignments.taken().token_N
    return int((call.scored_T & (call.group_T == index))[token_N].sum())
