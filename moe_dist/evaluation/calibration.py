"""Thresholds that give each expert the load of its training: set on training tokens, before a held-out evaluation.

The model sees training batches in the way of evaluation, but chooses as in training; each expert's threshold becomes the
score above which lie as many of their tokens, over all ranks and batches together, as it takes of them. It is a quantile of
all scores at once, found by halving an interval: one sum of L x E counts over the ranks for each of `HALVINGS`, named
`calibration counts`. What is left between the loads of evaluation and training is what the layers before make of it (their
choice is another), and other text.

Shape letters: L MoE layers, T tokens, E experts.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.reduce import sum_over
from moe_dist.comm.watch import Watch
from moe_dist.data.batch import Batch
from moe_dist.evaluation.heldout import forward
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter, choice_of_training

HALVINGS = 30  # the interval [0, 1] ends at 1e-9: below what fp32 tells apart near a score


def by_threshold(model: Transformer) -> list[ExpertChoiceRouter]:
    """The routers that evaluate by thresholds, in order of the layers."""
    routers = [layer.router for layer in model.moe_modules()]
    return [each for each in routers if isinstance(each, ExpertChoiceRouter) and each.causal == "threshold"]


@torch.no_grad()
def calibrate(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    group_of_modality: Tensor,
    world: dist.ProcessGroup | None,
    watch: Watch | None = None,
) -> None:
    """Sets the thresholds of all layers, in place. Collective: every rank brings as many batches; without any nothing
    changes. An expert whose group has no token in them keeps its threshold."""
    routers = by_threshold(model)
    if not routers or not batches:
        return
    scores_LTE, taken_LE = _seen(model, routers, batches, group_of_modality)
    taken_LE = sum_over(taken_LE, world, name="calibration counts", watch=watch)
    low_LE, high_LE = torch.zeros_like(taken_LE), torch.ones_like(taken_LE)
    for _ in range(HALVINGS):
        middle_LE = (low_LE + high_LE) / 2
        above_LE = (scores_LTE > middle_LE[:, None]).sum(1).to(torch.float64)
        above_LE = sum_over(above_LE, world, name="calibration counts", watch=watch)
        too_many_LE = above_LE > taken_LE
        low_LE = torch.where(too_many_LE, middle_LE, low_LE)
        high_LE = torch.where(too_many_LE, high_LE, middle_LE)
    for layer, router in enumerate(routers):
        for gate, group in zip(router.gates(), router.groups, strict=True):
            mine = slice(group.first_expert, group.first_expert + group.num_experts)
            known = taken_LE[layer, mine] > 0
            gate.threshold.copy_(torch.where(known, high_LE[layer, mine].to(gate.threshold.dtype), gate.threshold))


def _seen(
    model: Transformer, routers: Sequence[ExpertChoiceRouter], batches: Sequence[Batch], group_of_modality: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's scores [L, T, E] and, float64 [L, E], how many tokens each expert took."""
    scores: dict[ExpertChoiceRouter, list[Tensor]] = {router: [] for router in routers}
    taken: dict[ExpertChoiceRouter, list[Tensor]] = {router: [] for router in routers}

    def note(router: Any, inputs: Any, routing: Any) -> None:
        scores[router].append(router.scores(*inputs[:2]))
        taken[router].append(routing.sums.choices_C)

    training = model.training
    model.eval()
    with ExitStack() as stack:
        stack.enter_context(choice_of_training(routers))
        for router in routers:
            stack.callback(router.register_forward_hook(note).remove)
        for batch in batches:
            forward(model, batch.to(group_of_modality.device), group_of_modality)
    model.train(training)
    return (
        torch.stack([torch.cat(scores[router]) for router in routers]),
        torch.stack([torch.stack(taken[router]).sum(0) for router in routers]).to(torch.float64),
    )
