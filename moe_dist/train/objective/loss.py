"""The loss of a step: cross entropy and auxiliary terms. Each rank divides its sums by counts over all ranks, so that the
results of the ranks add up to the loss of the step.

Shape letters: B sequences, S positions, V vocabulary, M modalities, L MoE layers, G groups, C choice columns, E true
experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import start_sum
from moe_dist.comm.names import DEPTH_COUNTS, ROUTING_COUNTS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.distillation import TeacherOutput
from moe_dist.model.objective import Choices
from moe_dist.model.transformer import Transformer
from moe_dist.moe.balance.step_load import StepLoad
from moe_dist.moe.losses import AuxSettings, ColumnTables, balance_terms, z_terms
from moe_dist.moe.routing.counts import FRACTIONAL, StepCounts
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport, RoutingRequest
from moe_dist.monitor.statistics import DepthStatistics
from moe_dist.optim.optimizer import coefficient_at
from moe_dist.placement.placement import ExpertPlacement


def aux_at(step: int, *, schedule: Sequence[tuple[int, float]], **settings: Any) -> AuxSettings:
    """Returns the settings of step `step` (0-based): `settings`, but with the balance coefficient of `schedule` at this
    step."""
    return AuxSettings(balance=coefficient_at(schedule, step), **settings)


class MicroLoss(NamedTuple):
    """The losses of one micro-batch on this rank. Only `total` has a gradient; the other losses are float64."""

    total: Tensor  # share of this micro-batch and rank in the step's loss
    nll_M: Tensor  # sum of token losses by the label's modality, in nats
    balance: Tensor  # balance term in `total`
    z: Tensor  # z term in `total`
    auxiliary: Tensor  # in `total`: loss of auxiliary routers, router tuning term, or distillation term
    counts: StepCounts[Tensor]  # routing counts of the micro-batch over all ranks


def sums_by_modality(values_BS: Tensor, labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Returns the sum of `values_BS` by modality of the label, over positions whose label is not IGNORED: float64 [M]."""
    member = _labels_of_modalities(labels_BS, modality_BS, num_modalities)
    return values_BS.detach().flatten().to(torch.float64) @ member.to(torch.float64)


def labels_by_modality(labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Returns the number of labels of each modality, without IGNORED labels: float64 [M]."""
    return _labels_of_modalities(labels_BS, modality_BS, num_modalities).sum(0, dtype=torch.float64)


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
    """Runs a transformer or its data-parallel wrapper. Returns one report per MoE layer, and logits [B, S, V]; or with
    `losses` the cross entropy of each label [B, S], over the batch's choices if the batch has any; or with a `teacher`
    cross entropy and KL divergence [2, B, S]."""
    group_BS = group_of_modality[batch.modality_BS].masked_fill(batch.padding_BS, -1)
    labels_BS = batch.labels_BS if losses else None
    inputs = (batch.tokens_BS, batch.positions_BS, batch.documents_BS, group_BS, request, labels_BS)
    choice_BK = batch.choices() if losses else None
    objective = teacher if choice_BK is None else Choices(choice_BK)
    return model(*inputs) if objective is None else model(*inputs, objective)


def global_counts(
    reports: Sequence[LayerReport], group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
) -> Callable[[], StepCounts[Tensor]]:
    """Starts the sum of the counts in `reports` over all ranks: one all-reduce, and a second one with mixture of depths.

    Collective: all ranks must call this function once per micro-batch, outside recomputed code. Returns a function that
    waits for the sums and returns them in float64; without mixture of depths the fields depth_... are empty.
    """
    sums = [report.sums for report in reports]
    rows = [
        (each.choices_C, each.tokens_G, each.entropy_G, each.dropped_E, *(each.choice or [each.tokens_G[:0]] * 3))
        for each in sums
    ]
    parts = [torch.stack(part).to(torch.float64) for part in zip(*rows, strict=True)]
    # One row of fields per layer. Another layout would change the last bits of sums, because the order in which an
    # all-reduce adds the ranks' numbers depends on their place in the tensor.
    packed = start_sum(torch.cat(parts, dim=1), group, name=ROUTING_COUNTS, tracker=tracker)
    depth = _depth_counts(reports, parts[1], group, tracker)
    return lambda: StepCounts(*packed().split([part.shape[1] for part in parts], dim=1), *depth())


def _depth_counts(
    reports: Sequence[LayerReport],
    tokens_LG: Tensor,
    group: dist.ProcessGroup | None,
    tracker: CollectiveTracker | None,
) -> Callable[[], Sequence[Tensor]]:
    """Starts one all-reduce, which sums the mixture-of-depths counts over all ranks.

    Returns a function that waits for the sums and returns the fields of `StepCounts` from depth_tokens_P to depth_taken_PG.
    Without mixture of depths nothing is sent, and the returned fields are empty.
    """
    rows = []
    for report in reports:
        if report.depth is not None and report.members_G is not None:
            d = report.depth
            single = torch.stack([part.to(torch.float64) for part in (d.tokens, d.taken, d.agreed, d.cut, d.weight)])
            rows.append(torch.cat([single, report.members_G, report.sums.tokens_G]))
    if not rows:
        return lambda: [*[tokens_LG.new_zeros(0)] * 4, *[tokens_LG[:0]] * 2]
    started = start_sum(torch.stack(rows), group, name=DEPTH_COUNTS, tracker=tracker)

    def fields() -> Sequence[Tensor]:
        summed = started()
        tokens_P, _, agreed_P, kth_score_P, weight_P = summed[:, :5].unbind(1)
        return [tokens_P, agreed_P, kth_score_P, weight_P, *summed[:, 5:].chunk(2, dim=1)]

    return fields


def step_counts(micro_batches: Sequence[StepCounts[Tensor]]) -> StepCounts[Tensor]:
    """Sums the counts over a step's micro-batches, field by field."""
    return StepCounts(*(torch.stack(parts).sum(0) for parts in zip(*micro_batches, strict=True)))


def depth_statistics(
    model: Transformer, placement: ExpertPlacement, tokens_LG: np.ndarray, taken_LG: np.ndarray, **more: np.ndarray
) -> DepthStatistics:
    """Returns statistics of the model's mixture-of-depths layers. All counts must be sums over all ranks."""
    groups = tuple(group.name for group in placement.groups)
    layers, share = model.args.depth_layers, model.depth_routers()[0].token_share
    return DepthStatistics(layers, share, groups, tokens_LG, taken_LG, **more)


def on_host(counts: StepCounts[Tensor]) -> StepCounts[np.ndarray]:
    """Copies counts to the host. All fields become int64, except the fields in FRACTIONAL, which stay float64."""
    return counts_from(torch.cat([part.flatten() for part in counts]).cpu().numpy(), counts)  # one sync for all fields


def counts_from(flat: np.ndarray, counts: StepCounts[Tensor]) -> StepCounts[np.ndarray]:
    """Cuts `flat`, the concatenation of flattened fields, into fields with the shapes of `counts`."""
    arrays, end = {}, 0
    for name, part in zip(counts._fields, counts, strict=True):
        start, end = end, end + part.numel()
        arrays[name] = flat[start:end].reshape(part.shape).astype(np.float64 if name in FRACTIONAL else np.int64)
    return StepCounts(**arrays)


def auxiliary_terms(reports: Sequence[LayerReport], tokens_LG: Tensor, tables: ColumnTables) -> Tensor:
    """Returns this rank's share of the auxiliary routers' loss, [L, G] ([0, G] without auxiliary routers). For each layer
    and group the loss is the mean binary cross entropy over the group's tokens and experts (MoMa, arXiv 2407.21770, section
    2.4).

    Args:
        tokens_LG: Number of tokens over all ranks; the loss of a group without tokens is 0.
    """
    known = [report.sums.auxiliary_G for report in reports if report.sums.auxiliary_G is not None]
    if not known:
        return tokens_LG.new_zeros((0, tokens_LG.shape[1]))
    return torch.stack(known) / (tokens_LG.clamp_min(1.0) * tables.size_G).to(known[0].dtype)


def depth_auxiliary(reports: Sequence[LayerReport], tokens_P: Tensor) -> Tensor:
    """Returns this rank's share of the loss of auxiliary mixture-of-depths routers: the mean binary cross entropy over the
    tokens of all ranks, summed over the layers. Only the auxiliary routers get gradients from this loss."""
    mixture_of_depths = [report.depth for report in reports if report.depth is not None]
    terms = [depth.auxiliary / tokens for depth, tokens in zip(mixture_of_depths, tokens_P.clamp_min(1.0), strict=True)
             if depth.auxiliary is not None]  # fmt: skip
    return torch.stack(terms).sum() if terms else tokens_P.new_zeros(())


def micro_loss(
    losses_BS: Tensor,
    reports: Sequence[LayerReport],
    labels_BS: Tensor,
    label_modality_BS: Tensor,
    *,
    num_modalities: int,
    tables: ColumnTables,
    aux: AuxSettings,
    labels_in_step: Tensor,
    share: Tensor,
    counts: StepCounts[Tensor],
    share_G: Tensor | None = None,
    load: StepLoad | None = None,
) -> MicroLoss:
    """Returns the share of one micro-batch on this rank in the step's loss:

        sum of token losses / labels in the step  +  share * (c_b sum_layers,groups balance + c_z sum_layers z
                                                              + sum_layers,groups auxiliary)

    Args:
        losses_BS: Cross entropy of each label, 0 where the label is IGNORED.
        labels_in_step: Number of labels (without IGNORED) of the step, over all ranks and micro-batches.
        share: Weight of the micro-batch in the step. The auxiliary terms are means over the micro-batch's tokens on all
            ranks.
        counts: Routing counts of the micro-batch over all ranks (`global_counts`).
        share_G: Weight of each group's balance and auxiliary-router terms; None to use `share`.
        load: Expert loads for the balance loss; None to use the loads in the micro-batch.
    """

    def weighted(coefficient: float, terms_LG: Tensor) -> Tensor:
        if share_G is None:
            return coefficient * share * terms_LG.sum()  # another order would change the last bit of a run's loss
        return coefficient * (share_G * terms_LG.sum(0)).sum()

    prob_LC = torch.stack([report.sums.prob_C for report in reports])
    log_z_LG = torch.stack([report.sums.log_z_squared_G for report in reports])
    balance_LG = balance_terms(
        prob_LC,
        (load or counts).choices_LC,
        counts.tokens_LG,
        tables,
        kind=aux.kind,
        null_weight_G=aux.null_weight_G,
        load_tokens_LG=None if load is None else load.tokens_LG,
    )
    balance = weighted(aux.balance, balance_LG)
    z = aux.z * share * z_terms(log_z_LG, counts.tokens_LG).sum()
    auxiliary = weighted(1.0, auxiliary_terms(reports, counts.tokens_LG, tables))
    total = losses_BS.sum() / labels_in_step + balance + z + auxiliary
    if counts.depth_tokens_P.numel():
        total = total + share * depth_auxiliary(reports, counts.depth_tokens_P)
    return MicroLoss(
        total=total,
        nll_M=sums_by_modality(losses_BS, labels_BS, label_modality_BS, num_modalities),
        balance=balance.detach().to(torch.float64),
        z=z.detach().to(torch.float64),
        auxiliary=auxiliary.detach().to(torch.float64),
        counts=counts,
    )
