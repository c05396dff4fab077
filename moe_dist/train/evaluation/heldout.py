"""Computes held-out losses by modality from sums over all ranks. The losses do not depend on the number of ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import EVALUATION_COUNTS, EVALUATION_SUMS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import LayerReport, RoutingRequest
from moe_dist.train.objective.loss import forward, sums_by_modality


@dataclass(frozen=True)
class Heldout:
    """Held-out losses and routing counts, over all ranks.

    Attributes:
        loss: Nats per label by the label's modality; '<modality>_no_filler' is the loss without filler (the background
            cells of pictures), if the data mark filler. Modalities without labels are left out.
        tokens: Number of labels over which each entry of `loss` is a mean.
        choices_LC: int64, number of choices per layer and expert column, see `moe_dist.monitor.statistics`; None without
            batches.
        tokens_LG: int64, number of routed tokens per layer and group; None without batches.
        depth_2LG: int64, per mixture-of-depths layer and group: [0] number of tokens, [1] number of tokens that the layer
            computed. None without mixture-of-depths layers or batches.
    """

    loss: Mapping[str, float]
    tokens: Mapping[str, int]
    choices_LC: np.ndarray | None
    tokens_LG: np.ndarray | None = None
    depth_2LG: np.ndarray | None = None


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
        model: The transformer itself, not its DDP wrapper.
        group_of_modality: int64 [M], index of the expert group of each modality.
        experts_off: Whether to leave out routed experts' output, to measure by how much it lowers the loss.
        counts_tokens: False if another rank counts this rank's tokens and losses.
    """
    device, request = group_of_modality.device, RoutingRequest(experts_off=experts_off)
    sums_4M = torch.zeros(4, len(modalities), dtype=torch.float64, device=device)  # on the device, without syncs
    counts: list[Tensor] = []
    shapes: list[torch.Size] = []
    training = model.training
    model.eval()
    for batch in batches:
        on_device = batch.to(device)
        losses_BS, reports = forward(model, on_device, group_of_modality, request, losses=True)
        if counts_tokens:
            sums_4M += _sums(losses_BS, on_device, len(modalities))
        parts = _counts(reports)
        shapes = [part.shape for part in parts]
        counts.append(torch.cat([part.flatten() for part in parts]))
    model.train(training)  # the model's mode before the call
    if not counts:  # no rank has batches: all have equally many
        return Heldout({}, {}, None)
    summed = sum_over(torch.stack(counts).sum(0), world, name=EVALUATION_COUNTS, tracker=tracker).cpu()
    flat = summed.split([shape.numel() for shape in shapes])
    choices_LC, tokens_LG, *depth = (part.view(shape).numpy() for part, shape in zip(flat, shapes, strict=True))
    nll_M, labels_M, nll_filler_M, filler_M = sum_over(sums_4M, world, name=EVALUATION_SUMS, tracker=tracker).tolist()
    loss, tokens = {}, {}
    for i, name in enumerate(modalities):
        parts = [(name, nll_M[i], labels_M[i])]
        if filler_M[i]:
            parts.append((f"{name}_no_filler", nll_M[i] - nll_filler_M[i], labels_M[i] - filler_M[i]))
        for part, nll, count in parts:
            if count:
                loss[part], tokens[part] = nll / count, round(count)
    return Heldout(loss, tokens, choices_LC, tokens_LG, depth[0] if depth else None)


def _counts(reports: Sequence[LayerReport]) -> list[Tensor]:
    """Returns the fields `choices_LC`, `tokens_LG` and, with mixture of depths, `depth_2LG` of `Heldout` for one batch."""
    parts = [torch.stack([report.sums.choices_C for report in reports])]
    parts.append(torch.stack([report.sums.tokens_G for report in reports]))
    mixture_of_depths = [torch.stack([r.members_G, r.sums.tokens_G]) for r in reports if r.members_G is not None]
    return [*parts, torch.stack(mixture_of_depths, dim=1)] if mixture_of_depths else parts


def _sums(losses_BS: Tensor, batch: Batch, num_modalities: int) -> Tensor:
    """Returns float64 [4, M], by modality: loss sum and number of all labels, then loss sum and number of filler labels."""
    ones = torch.ones_like(losses_BS)
    filler_labels = torch.where(batch.filler_BS, batch.labels_BS, IGNORED)
    return torch.stack(
        [
            sums_by_modality(values, labels, batch.label_modality_BS, num_modalities)
            for labels in (batch.labels_BS, filler_labels)
            for values in (losses_BS, ones)
        ]
    )
