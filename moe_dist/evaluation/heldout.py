"""Held-out losses by modality: sums over all ranks, the same whatever the number of ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.reduce import sum_over
from moe_dist.comm.watch import Watch
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.loss import sums_by_modality, token_losses
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing import BatchFacts, LayerReport


@dataclass(frozen=True)
class Heldout:
    """Held-out sums over all ranks.

    Attributes:
        loss: Nats a token by the label's modality, and '<modality>_no_filler' where the data marks filler cells;
            modalities without labels are left out.
        tokens: Labels behind each loss.
        choices_LC: int64, how often each column was chosen, see `moe_dist.monitor.statistics`; None without batches.
        tokens_LG: int64, tokens routed in each group; None without batches.
    """

    loss: Mapping[str, float]
    tokens: Mapping[str, int]
    choices_LC: np.ndarray | None
    tokens_LG: np.ndarray | None = None


@torch.no_grad()
def heldout_losses(
    model: Transformer,
    batches: Sequence[Batch],
    *,
    modalities: Sequence[str],
    group_of_modality: Tensor,
    world: dist.ProcessGroup | None,
    watch: Watch | None = None,
) -> Heldout:
    """Losses by modality. Collective: every rank must bring the same number of batches.

    Args:
        model: The transformer itself, not its DDP wrapper.
        group_of_modality: int64 [M], expert group of each modality.
    """
    device = group_of_modality.device
    sums_4M = torch.zeros(4, len(modalities), dtype=torch.float64, device=device)
    choices: list[Tensor] = []
    num_groups = 0
    training = model.training
    model.eval()
    for batch in batches:
        on_device = batch.to(device)
        logits, reports = forward(model, on_device, group_of_modality)
        sums_4M += _sums(token_losses(logits, on_device.labels_BS), on_device, len(modalities))
        num_groups = reports[0].sums.tokens_G.shape[0]
        choices.append(torch.stack([torch.cat([r.sums.choices_C, r.sums.tokens_G]) for r in reports]))
    model.train(training)
    if not choices:  # nothing is held out; on no rank, since all have the same number of batches
        return Heldout({}, {}, None)
    counts_LX = sum_over(torch.stack(choices).sum(0), world, name="evaluation counts", watch=watch).cpu().numpy()
    nll_M, labels_M, nll_filler_M, filler_M = sum_over(sums_4M, world, name="evaluation sums", watch=watch).tolist()
    loss, tokens = {}, {}
    for i, name in enumerate(modalities):
        parts = [(name, nll_M[i], labels_M[i])]
        if filler_M[i]:
            parts.append((f"{name}_no_filler", nll_M[i] - nll_filler_M[i], labels_M[i] - filler_M[i]))
        for part, nll, count in parts:
            if count:
                loss[part], tokens[part] = nll / count, round(count)
    return Heldout(loss, tokens, counts_LX[:, :-num_groups], counts_LX[:, -num_groups:])


def forward(
    model: Callable[..., tuple[Tensor, Sequence[LayerReport]]],
    batch: Batch,
    group_of_modality: Tensor,
    facts: BatchFacts | None = None,
) -> tuple[Tensor, Sequence[LayerReport]]:
    """Logits and reports of one batch on its device: a transformer, or its parallel wrapper, over a `Batch`."""
    group_BS = torch.where(batch.padding_BS, -1, group_of_modality[batch.modality_BS])
    return model(batch.tokens_BS, batch.positions_BS, batch.documents_BS, group_BS, facts)


@contextmanager
def experts_ablated(model: Transformer) -> Iterator[None]:
    """Inside, the routed experts' output is zero: what the loss rises by is what they contribute."""
    layers = model.moe_modules()
    for layer in layers:
        layer.ablated = True
    try:
        yield
    finally:
        for layer in layers:
            layer.ablated = False


def _sums(losses_BS: Tensor, batch: Batch, num_modalities: int) -> Tensor:
    """Losses and labels, of all labels and of filler cells alone: float64 [4, M]."""
    ones = torch.ones_like(losses_BS)
    filler_labels = torch.where(batch.filler_BS, batch.labels_BS, IGNORED)
    return torch.stack(
        [
            sums_by_modality(values, labels, batch.label_modality_BS, num_modalities)
            for labels in (batch.labels_BS, filler_labels)
            for values in (losses_BS, ones)
        ]
    )
