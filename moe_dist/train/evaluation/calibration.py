"""Calibrates the thresholds of routers before a held-out evaluation, so that each expert and each mixture-of-depths layer
selects, by its threshold, the same fraction of tokens as in training.

The model runs on training batches in evaluation mode, but each expert or layer selects its tokens without a threshold, as
in training. Each threshold is then set so that, over all ranks and batches, the number of tokens whose score exceeds it
equals the number of selected tokens. Bisection finds all thresholds with `HALVINGS` all-reduces of N counts, named
`calibration counts`. In an evaluation the fraction may still differ, for two reasons: earlier layers with thresholds select
other tokens than in training, and held-out tokens differ from training tokens.

Shape letters: N thresholds of all routers, n thresholds of one router, T tokens that reach the router (in a
mixture-of-depths layer these are only the selected tokens).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import CALIBRATION_COUNTS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routers.selection import ChoosingRouter, choice_of_training
from moe_dist.train.objective.loss import forward

HALVINGS = 30  # 30 halvings of [0, 1] give a width of 1e-9, below the resolution of fp32 scores


def by_threshold(model: Transformer) -> list[ChoosingRouter]:
    """Returns the routers with thresholds, in layer order: first MoE routers, then mixture-of-depths routers."""
    routers = [*(layer.router for layer in model.moe_modules()), *model.depth_routers()]
    return [each for each in routers if isinstance(each, ChoosingRouter) and each.causal == "threshold"]


@torch.no_grad()
def calibrate(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    group_of_modality: Tensor,
    world: dist.ProcessGroup | None,
    tracker: CollectiveTracker | None = None,
    steps: int,
) -> None:
    """Sets the thresholds of all layers in place. `world` is the group of ranks that have this rank's layers. Without
    batches all thresholds stay unchanged. An expert that selected no token keeps its threshold. `steps` is the number of
    training steps so far; the fraction of tokens that a layer selects may depend on it.

    Collective: every rank must pass the same number of batches.
    """
    routers = by_threshold(model)
    if not batches:
        return
    scores, taken = _seen(model, routers, batches, group_of_modality, steps)
    if not routers:  # this rank ran the forward passes because other ranks have layers with thresholds
        return
    sizes = [len(taken_n) for taken_n in taken]
    taken_N = sum_over(torch.cat(taken), world, name=CALIBRATION_COUNTS, tracker=tracker)
    low_N, high_N = torch.zeros_like(taken_N), torch.ones_like(taken_N)  # scores are probabilities in [0, 1]
    for _ in range(HALVINGS):
        middle_N = (low_N + high_N) / 2
        above = [(scores_Tn > middle_n).sum(0) for scores_Tn, middle_n in zip(scores, middle_N.split(sizes), strict=True)]
        above_N = sum_over(torch.cat(above).to(torch.float64), world, name=CALIBRATION_COUNTS, tracker=tracker)
        too_many_N = above_N > taken_N
        low_N = torch.where(too_many_N, middle_N, low_N)
        high_N = torch.where(too_many_N, high_N, middle_N)
    thresholds = [gate.running_mean()[0] for router in routers for gate in router.gates()]
    sizes = [len(threshold_n) for threshold_n in thresholds]
    for threshold_n, known_n, high_n in zip(thresholds, (taken_N > 0).split(sizes), high_N.split(sizes), strict=True):
        threshold_n.copy_(torch.where(known_n, high_n.to(threshold_n.dtype), threshold_n))


def _seen(
    model: Transformer,
    routers: Sequence[ChoosingRouter],
    batches: Sequence[Batch],
    group_of_modality: Tensor,
    steps: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns, for each router, the scores of this rank's tokens [T, n], and the number of tokens selected by each expert
    or layer, float64 [n]. All scores are in memory at once: T times the sum of n over the routers."""
    scores: dict[ChoosingRouter, list[Tensor]] = {router: [] for router in routers}
    taken: dict[ChoosingRouter, list[Tensor]] = {router: [] for router in routers}

    def note(router: Any, inputs: Any, chosen: Any) -> None:
        scores[router].append(router.scores(*inputs[:2]))  # recomputes the scores of this forward pass
        taken[router].append(router.num_taken(chosen))

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(choice_of_training(routers, steps))
        for router in routers:
            stack.callback(router.register_forward_hook(note).remove)
        for batch in batches:
            forward(model, batch.to(group_of_modality.device), group_of_modality)
    return (
        [torch.cat(scores[router]) for router in routers],
        [torch.stack(taken[router]).sum(0).to(torch.float64) for router in routers],
    )
