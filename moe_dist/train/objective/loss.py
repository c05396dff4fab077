"""Computes the loss of a step: cross entropy and auxiliary terms. Each rank divides its sums by counts over all ranks, so
the sum of the ranks' results is the loss of the step.

Shape letters: B sequences, S positions, V vocabulary, M modalities, L MoE layers, P mixture-of-depths layers, G groups, C
choice columns, E true experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import pack, start_sum, unpack
from moe_dist.comm.names import ROUTING_COUNTS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.objective import Choices, TeacherOutput
from moe_dist.model.transformer import Transformer
from moe_dist.moe.losses import AuxSettings, ColumnTables, StepLoad, balance_terms, z_terms
from moe_dist.moe.routing.counts import FRACTIONAL, AuxSums, DepthCounts, RoutingCounts
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport, RoutingRequest
from moe_dist.monitor.statistics import DepthStatistics
from moe_dist.optim.optimizer import coefficient_at
from moe_dist.placement.placement import ExpertPlacement


def aux_at(step: int, *, schedule: Sequence[tuple[int, float]], **settings: Any) -> AuxSettings:
    """Returns the settings of the auxiliary losses at step `step` (0-based). `schedule` gives the balance coefficient."""
    return AuxSettings(balance=coefficient_at(schedule, step), **settings)


class MicroLoss(NamedTuple):
    """The losses of one micro-batch on this rank. Only `total` has a gradient; the other losses are float64."""

    total: Tensor  # contribution of this micro-batch and rank to the step's loss
    nll_M: Tensor  # sum of the cross entropies of labels, by the label's modality, in nats
    balance: Tensor  # balance term in `total`
    z: Tensor  # router z-loss term in `total`
    auxiliary: Tensor  # part of `total`: loss of auxiliary routers, router tuning term, or distillation term


def sums_by_modality(values_BS: Tensor, labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Returns the sum of `values_BS` by the label's modality, over positions whose label is not IGNORED: float64 [M]."""
    member = _labels_of_modalities(labels_BS, modality_BS, num_modalities)
    return values_BS.detach().flatten().to(torch.float64) @ member.to(torch.float64)


def labels_by_modality(labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Returns the number of labels of each modality, without IGNORED labels: float64 [M]."""
    return _labels_of_modalities(labels_BS, modality_BS, num_modalities).sum(0, dtype=torch.float64)


def tokens_by_group(batches: Sequence[Batch], group_of_modality: Tensor, num_groups: int) -> Tensor:
    """Returns the number of tokens of each micro-batch and group, without padding, float64 [I, G]."""
    groups, tokens_IG = torch.arange(num_groups, device=group_of_modality.device), []
    for batch in batches:
        group_BS = torch.where(batch.padding_BS, -1, group_of_modality[batch.modality_BS])
        tokens_IG.append((group_BS.flatten()[:, None] == groups).sum(0, dtype=torch.float64))
    return torch.stack(tokens_IG) if tokens_IG else groups.new_zeros((0, num_groups), dtype=torch.float64)


def _labels_of_modalities(labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Returns a bool [B S, M]: whether a position has a label of the modality."""
    member = modality_BS.flatten()[:, None] == torch.arange(num_modalities, device=labels_BS.device)
    member &= (labels_BS != IGNORED).flatten()[:, None]
    return member


def forward(
    model: Callable[..., tuple[Tensor, Sequence[LayerReport]]],
    batch: Batch,
    group_of_modality: Tensor,
    request: RoutingRequest = NO_REQUEST,
    *,
    losses: bool = False,
    teacher: TeacherOutput | None = None,
) -> tuple[Tensor, Sequence[LayerReport]]:
    """Runs a transformer or its data-parallel wrapper. Returns logits [B, S, V] and one report per MoE layer. With
    `losses`, the cross entropy of each label [B, S] replaces the logits; it is over the batch's choices if the batch has
    any. With a `teacher`, cross entropy and KL divergence [2, B, S] replace them."""
    group_BS = group_of_modality[batch.modality_BS].masked_fill(batch.padding_BS, -1)
    labels_BS = batch.labels_BS if losses else None
    inputs = (batch.tokens_BS, batch.positions_BS, batch.documents_BS, group_BS, request, labels_BS)
    choice_BK = batch.choices() if losses else None
    objective = teacher if choice_BK is None else Choices(choice_BK)
    if (more := batch.family_inputs()) is not None:
        return model(*inputs, objective, more)
    return model(*inputs) if objective is None else model(*inputs, objective)


def global_counts(
    local: RoutingCounts[Tensor], group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
) -> Callable[[], RoutingCounts[Tensor]]:
    """Starts to sum a micro-batch's counts over all ranks: one all-reduce of a few numbers per layer, which all ranks must
    issue outside recomputed code. Returns a function that waits for the sums and returns them in float64."""
    summed = start_sum(pack(local), group, name=ROUTING_COUNTS, tracker=tracker)
    return lambda: unpack(summed(), local)


def whole_numbers(counts: RoutingCounts[np.ndarray]) -> RoutingCounts[np.ndarray]:
    """Converts float64 counts to int64, except the fields in `FRACTIONAL`."""
    depth = None if counts.depth is None else _whole(counts.depth)
    return _whole(counts._replace(depth=None))._replace(depth=depth)


def _whole(counts: Any) -> Any:
    whole = {name: each.astype(np.int64) for name, each in counts._asdict().items()
             if each is not None and name not in FRACTIONAL}  # fmt: skip
    return counts._replace(**whole)


def depth_statistics(
    model: Transformer, placement: ExpertPlacement, counts: DepthCounts[np.ndarray], **more: np.ndarray
) -> DepthStatistics:
    """Returns statistics of the model's mixture-of-depths layers. All counts must be sums over all ranks."""
    assert counts.tokens_PG is not None, "the transformer counts by group"
    assert counts.taken_PG is not None
    groups = tuple(group.name for group in placement.groups)
    layers, share = model.args.depth_layers, model.depth_routers()[0].token_share
    return DepthStatistics(layers, share, groups, counts.tokens_PG, counts.taken_PG, **more)


def auxiliary_terms(sums: AuxSums, tokens_LG: Tensor, tables: ColumnTables) -> Tensor:
    """Returns this rank's part of the auxiliary routers' loss, [L, G] ([0, G] without auxiliary routers). The loss of a
    layer and group is the mean binary cross entropy over the group's tokens and experts (MoMa, arXiv 2407.21770, section
    2.4). `tokens_LG` counts the tokens of all ranks. The loss of a group without tokens is 0."""
    if sums.auxiliary_LG is None:
        return tokens_LG.new_zeros((0, tokens_LG.shape[1]))
    return sums.auxiliary_LG / (tokens_LG.clamp_min(1.0) * tables.size_G).to(sums.auxiliary_LG.dtype)


def depth_auxiliary(auxiliary_P: Tensor, tokens_P: Tensor) -> Tensor:
    """Returns this rank's part of the loss of auxiliary mixture-of-depths routers. The loss is the mean binary cross
    entropy over the tokens of all ranks, summed over the layers. It gives gradients only to the auxiliary routers."""
    return (auxiliary_P / tokens_P.clamp_min(1.0)).sum()


def micro_loss(
    losses_BS: Tensor,
    sums: AuxSums,
    batch: Batch,
    *,
    num_modalities: int,
    tables: ColumnTables,
    aux: AuxSettings,
    labels_in_step: Tensor,
    share: Tensor,
    counts: RoutingCounts[Tensor],
    share_G: Tensor | None = None,
    load: StepLoad | None = None,
) -> MicroLoss:
    """Returns the part of the step's loss that comes from this rank's micro-batch:

        sum of token losses / labels in the step  +  share * (c_b sum_layers,groups balance + c_z sum_layers z
                                                              + sum_layers,groups auxiliary)

    Args:
        losses_BS: Cross entropy of each label; 0 where the label is IGNORED.
        sums: Sums over this rank's tokens, for all layers (`joined`).
        labels_in_step: Number of labels in the step, without IGNORED labels, over all ranks and micro-batches.
        share: Weight of the micro-batch in the step. Auxiliary terms are means over its tokens on all ranks.
        counts: Routing counts of the micro-batch over all ranks (`global_counts`).
        share_G: Weight of the balance and auxiliary-router terms of each group; None to use `share` for all groups.
        load: Expert loads for the balance loss; None to use the micro-batch's own loads.
    """

    def weighted(coefficient: float, terms_LG: Tensor) -> Tensor:
        if share_G is None:
            return coefficient * share * terms_LG.sum()  # another order would change the last bit of a run's loss
        return coefficient * (share_G * terms_LG.sum(0)).sum()

    balance_LG = balance_terms(
        sums.prob_LC,
        (load or counts).choices_LC,
        counts.tokens_LG,
        tables,
        kind=aux.kind,
        null_weight_G=aux.null_weight_G,
        load_tokens_LG=None if load is None else load.tokens_LG,
    )
    balance = weighted(aux.balance, balance_LG)
    z = aux.z * share * z_terms(sums.log_z_squared_LG, counts.tokens_LG).sum()
    auxiliary = weighted(1.0, auxiliary_terms(sums, counts.tokens_LG, tables))
    total = losses_BS.sum() / labels_in_step + balance + z + auxiliary
    if sums.depth_auxiliary_P is not None:
        assert counts.depth is not None, "the layers that have these sums count their tokens"
        total = total + share * depth_auxiliary(sums.depth_auxiliary_P, counts.depth.tokens_P)
    return MicroLoss(
        total=total,
        nll_M=sums_by_modality(losses_BS, batch.labels_BS, batch.label_modality_BS, num_modalities),
        balance=balance.detach().to(torch.float64),
        z=z.detach().to(torch.float64),
        auxiliary=auxiliary.detach().to(torch.float64),
    )
