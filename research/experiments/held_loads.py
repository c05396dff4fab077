"""Changes a trained model so that its load equals a budget on held-out sequences that are in no table.

In training, a method keeps the mean number of true experts per token at the budget. On held-out tokens, the trained model
may use more or fewer: the last biases follow the noise of the last steps, and unfamiliar tokens have different scores. So
in each layer, one number is added to the selection biases of all true experts of a group. For experts that choose
tokens, this number is subtracted from their thresholds. Bisection finds the number with which the group's tokens use
the budget. As in the tables, only tokens with a label count. Layers are changed in order, because a layer changes the
inputs of later layers. Routers with a fixed number of experts per token are left unchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import ChoosingRouter
from moe_dist.moe.routing.types import Routing, RoutingCache
from moe_dist.train.objective.loss import forward

FARTHEST = 64.0  # largest shift; no logit or probability is as large
HALVINGS = 24  # number of bisection steps, after which the interval has a width of 1e-5


class Lever(NamedTuple):
    """The selection biases or thresholds of a group's true experts, as a view of a buffer. `sign` is 1.0 if larger values
    give tokens more experts, and -1.0 if larger values give tokens fewer experts."""

    value_n: Tensor
    sign: float


class Call(NamedTuple):
    """The arguments of a router for the tokens of one batch, and whether each token has a label."""

    h_TD: Tensor
    group_T: Tensor
    cache: RoutingCache
    scored_T: Tensor


@torch.no_grad()
def hold_loads(model: Transformer, batches: Sequence[Batch], budget: float, group_of_modality: Tensor) -> None:
    """Shifts biases and thresholds in place. All experts must be on one rank. Groups without a token are left unchanged."""
    for layer in model.moe_modules():
        router: Any = layer.router
        calls = _calls(model, router, batches, group_of_modality)
        for index in range(len(router.groups)):
            lever = _lever(router, index)
            if lever is not None:
                _shift(router, calls, index, lever, budget)


def _calls(model: Transformer, router: Any, batches: Sequence[Batch], group_of_modality: Tensor) -> list[Call]:
    """Returns the router's arguments in a forward of each batch."""
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


def _lever(router: Any, index: int) -> Lever | None:
    """Returns the biases or thresholds to shift in a group; None if its tokens have a fixed number of true experts."""
    group = router.groups[index]
    if isinstance(router, ChoosingRouter):
        return Lever(router.gates()[index].running_mean()[0], -1.0)
    if not router.selection_bias:
        if not group.num_null:
            return None
        router.selection_bias = True  # biases of 0 change no choice
        router.reset_buffers()
    return Lever(router.gate(group).bias[: group.num_experts], 1.0)


def _shift(router: Any, calls: Sequence[Call], index: int, lever: Lever, budget: float) -> None:
    tokens = sum(int(((each.group_T == index) & each.scored_T).sum()) for each in calls)
    if not tokens:
        return
    before_n, low, high = lever.value_n.clone(), -FARTHEST, FARTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        lever.value_n.copy_(before_n + lever.sign * middle)
        taken = sum(_taken(router, each, index) for each in calls)
        low, high = (middle, high) if taken < budget * tokens else (low, middle)
    lever.value_n.copy_(before_n + lever.sign * high)


def _taken(router: Any, call: Call, index: int) -> int:
    """Returns the number of (token, true expert) pairs, over the tokens of a group that have a label."""
    routing: Routing = router(call.h_TD, call.group_T, replace(call.cache))
    token_N = routing.assignments.taken().token_N
    return int((call.scored_T & (call.group_T == index))[token_N].sum())
