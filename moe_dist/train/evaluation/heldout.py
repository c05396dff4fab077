"""Computes held-out losses by modality from sums over all ranks. The losses do not depend on the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import added, joined, pack, sum_over, unpack
from moe_dist.comm.names import EVALUATION_COUNTS, EVALUATION_SUMS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.train.objective.loss import forward, sums_by_modality, whole_numbers


@dataclass(frozen=True)
class Heldout:
    """Held-out losses and routing counts, over all ranks.

    Attributes:
        loss: Mean loss in nats per label, by the label's modality. If the data mark filler (the background cells of
            pictures), '<modality>_no_filler' is the loss without it. Modalities without labels are left out.
        tokens: Maps each key of `loss` to the number of labels over which the loss is a mean.
        counts: Routing counts; None if there were no batches.
    """

    loss: Mapping[str, float]
    tokens: Mapping[str, int]
    counts: RoutingCounts[np.ndarray] | None


@torch.no_grad()
def heldout_losses(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    modalities: Sequence[str],
    group_of_modality: Tensor,
    world: dist.ProcessGroup | None,
    tracker: CollectiveTracker | None = None,
    experts_off: bool = False,
    counts_tokens: bool = True,
) -> Heldout:
    """Computes held-out losses and routing counts. Collective: every rank must pass the same number of batches.

    Args:
        model: The transformer, not wrapped by DDP.
        group_of_modality: int64 [M], index of the expert group of each modality.
        experts_off: Whether to leave out the output of routed experts, which shows by how much this output lowers the loss.
        counts_tokens: False if another rank counts the tokens and losses of this rank.
    """
    device, request = group_of_modality.device, RoutingRequest(experts_off=experts_off)
    sums_4M = torch.zeros(4, len(modalities), dtype=torch.float64, device=device)  # on the device, to add without syncs
    local: list[RoutingCounts[Tensor]] = []
    training = model.training
    model.eval()
    for batch in batches:
        on_device = batch.to(device)
        losses_BS, reports = forward(model, on_device, group_of_modality, request, losses=True)
        if counts_tokens:
            sums_4M += _sums(losses_BS, on_device, len(modalities))
        local.append(joined([report.counts for report in reports]))
    model.train(training)  # restores the mode that the model had before the call
    if not local:  # no rank has batches, because all ranks have the same number of batches
        return Heldout({}, {}, None)
    summed = sum_over(pack(added(local)), world, name=EVALUATION_COUNTS, tracker=tracker)
    counts = whole_numbers(unpack(summed.cpu().numpy(), local[0]))
    nll_M, labels_M, nll_filler_M, filler_M = sum_over(sums_4M, world, name=EVALUATION_SUMS, tracker=tracker).tolist()
    loss, tokens = {}, {}
    for i, name in enumerate(modalities):
        parts = [(name, nll_M[i], labels_M[i])]
        if filler_M[i]:
            parts.append((f"{name}_no_filler", nll_M[i] - nll_filler_M[i], labels_M[i] - filler_M[i]))
        for part, nll, count in parts:
            if count:
                loss[part], tokens[part] = nll / count, round(count)
    return Heldout(loss, tokens, counts)


def _sums(losses_BS: Tensor, batch: Batch, num_modalities: int) -> Tensor:
    """Returns float64 [4, M] by modality: loss sum and number of all labels, then loss sum and number of filler labels."""
    ones = torch.ones_like(losses_BS)
    filler_labels = torch.where(batch.filler_BS, batch.labels_BS, IGNORED)
    return torch.stack(
        [
            sums_by_modality(values, labels, batch.label_modality_BS, num_modalities)
            for labels in (batch.labels_BS, filler_labels)
            for values in (losses_BS, ones)
        ]
    )
