"""Cross entropy and the auxiliary terms, over global counts: a rank's loss is its share, and the shares add up.

Shape letters: B sequences, S positions, V vocabulary, M modalities, L MoE layers, G groups, C choice columns,
E true experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.data.batch import IGNORED
from moe_dist.moe.losses import BalanceKind, ColumnTables, balance_terms, z_terms
from moe_dist.moe.routing import LayerReport


@dataclass(frozen=True)
class AuxSettings:
    """Coefficients of the auxiliary terms in one step; `null_weight_G` as in `moe_dist.moe.losses.balance_terms`."""

    kind: BalanceKind
    balance: float
    z: float
    null_weight_G: tuple[float, ...] | None = None


class GlobalCounts(NamedTuple):
    """Counts of one micro-batch over all ranks: choices [L, C], tokens and entropy [L, G], dropped ones [L, E]; float64.

    Where experts choose their tokens also `kth_score_LE`, `above_LE` and `unrouted_LG`, see `ChoiceSums`; else these have no columns.
    """

    choices_LC: Tensor
    tokens_LG: Tensor
    entropy_LG: Tensor
    dropped_LE: Tensor
    kth_score_LE: Tensor
    above_LE: Tensor
    unrouted_LG: Tensor


class DepthCounts(NamedTuple):
    """Sums of `DepthSums` over all ranks, by layer that computes a share of the tokens: float64 [L]; tokens of each group,
    and those of them that are taken: [L, G]."""

    tokens_L: Tensor
    taken_L: Tensor
    agreed_L: Tensor
    kth_score_L: Tensor
    weight_L: Tensor
    members_LG: Tensor
    taken_LG: Tensor


class MicroLoss(NamedTuple):
    """One micro-batch on this rank.

    Attributes:
        total: This rank's share of the step's loss, to call backward on.
        nll_M: Summed token losses by the label's modality, nats; float64, no gradient.
        balance, z, auxiliary: This rank's shares of the terms as they entered `total`, the last of what is trained alone
            (auxiliary routers, router tuning); float64, no gradient.
        counts: Routing counts over all ranks.
        mixture_of_depths: Those of layers that compute a share of the tokens; None without any.
    """

    total: Tensor
    nll_M: Tensor
    balance: Tensor
    z: Tensor
    auxiliary: Tensor
    counts: GlobalCounts
    mixture_of_depths: DepthCounts | None = None


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy of each position [B, S] in fp32 (float64 for a float64 model); 0 where the label is IGNORED."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    losses = F.cross_entropy(
        logits_BSV.flatten(0, 1).to(dtype), labels_BS.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels_BS)


def sums_by_modality(values_BS: Tensor, labels_BS: Tensor, modality_BS: Tensor, num_modalities: int) -> Tensor:
    """Sum of `values_BS` over scored positions for each modality of the label, float64 [M]."""
    member = modality_BS.flatten()[:, None] == torch.arange(num_modalities, device=values_BS.device)
    member &= (labels_BS != IGNORED).flatten()[:, None]
    return values_BS.detach().flatten().to(torch.float64) @ member.to(torch.float64)


def global_counts(
    reports: Sequence[LayerReport], group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
) -> GlobalCounts:
    """Sums the layers' counts over all ranks: one all-reduce a micro-batch, outside any recomputation."""
    sums = [report.sums for report in reports]
    rows = [
        (each.choices_C, each.tokens_G, each.entropy_G, each.dropped_E, *(each.choice or [each.tokens_G[:0]] * 3))
        for each in sums
    ]
    parts = [torch.stack(part).to(torch.float64) for part in zip(*rows, strict=True)]
    packed = sum_over(torch.cat(parts, dim=1), group, name="routing counts", tracker=tracker)
    return GlobalCounts(*packed.split([part.shape[1] for part in parts], dim=1))


def auxiliary_terms(reports: Sequence[LayerReport], tokens_LG: Tensor, tables: ColumnTables) -> Tensor:
    """This rank's share of the auxiliary routers' loss of each layer and group, [L, G] (none: no rows): the mean binary
    cross entropy over the group's tokens and experts (MoMa, arXiv 2407.21770, section 2.4).

    Args:
        tokens_LG: Over all ranks; a group without tokens contributes 0.
    """
    sums = [report.sums.auxiliary_G for report in reports]
    known = [each for each in sums if each is not None]
    if not known:
        return tokens_LG.new_zeros((0, tokens_LG.shape[1]))
    return torch.stack(known) / (tokens_LG.clamp_min(1.0) * tables.size_G).to(known[0].dtype)


def depth_counts(
    reports: Sequence[LayerReport], group: dist.ProcessGroup | None, tracker: CollectiveTracker | None = None
) -> DepthCounts | None:
    """Sums the depth layers' counts over all ranks: one more all-reduce a micro-batch where there are such layers."""
    rows = []
    for report in reports:
        if report.depth is not None and report.members_G is not None:
            d = report.depth
            single = torch.stack([part.to(torch.float64) for part in (d.tokens, d.taken, d.agreed, d.cut, d.weight)])
            rows.append(torch.cat([single, report.members_G, report.sums.tokens_G]))
    if not rows:
        return None
    summed = sum_over(torch.stack(rows), group, name="depth counts", tracker=tracker)
    single_L5, by_group = summed[:, :5], summed[:, 5:]
    return DepthCounts(*single_L5.unbind(1), *by_group.chunk(2, dim=1))


def depth_auxiliary(reports: Sequence[LayerReport], tokens_L: Tensor) -> Tensor:
    """This rank's share of the auxiliary depth routers' loss: the mean binary cross entropy over all tokens, summed over
    the layers. Its gradient reaches these routers alone."""
    mixture_of_depths = [report.depth for report in reports if report.depth is not None]
    terms = [depth.auxiliary / tokens for depth, tokens in zip(mixture_of_depths, tokens_L.clamp_min(1.0), strict=True)
             if depth.auxiliary is not None]  # fmt: skip
    return torch.stack(terms).sum() if terms else tokens_L.new_zeros(())


def micro_loss(
    logits_BSV: Tensor,
    reports: Sequence[LayerReport],
    labels_BS: Tensor,
    label_modality_BS: Tensor,
    *,
    num_modalities: int,
    tables: ColumnTables,
    aux: AuxSettings,
    labels_in_step: Tensor,
    share: Tensor,
    world: dist.ProcessGroup | None,
    tracker: CollectiveTracker | None = None,
) -> MicroLoss:
    """This rank's share of the step's loss for one micro-batch.

        sum of token losses / labels in the step  +  share * (c_b sum_layers,groups balance + c_z sum_layers z
                                                              + sum_layers,groups auxiliary)

    Args:
        tables: Constants of the expert groups.
        labels_in_step: Scored labels of the whole step over all ranks and micro-batches.
        share: The micro-batch's part of them; the auxiliary statistic's unit is one micro-batch over all ranks.
        world: Group over which counts are summed.
        tracker: For the watchdog.
    """
    losses_BS = token_losses(logits_BSV, labels_BS)
    counts = global_counts(reports, world, tracker)
    prob_LC = torch.stack([report.sums.prob_C for report in reports])
    log_z_LG = torch.stack([report.sums.log_z_squared_G for report in reports])
    balance_LG = balance_terms(
        prob_LC, counts.choices_LC, counts.tokens_LG, tables, kind=aux.kind, null_weight_G=aux.null_weight_G
    )
    balance = aux.balance * share * balance_LG.sum()
    z = aux.z * share * z_terms(log_z_LG, counts.tokens_LG).sum()
    auxiliary = share * auxiliary_terms(reports, counts.tokens_LG, tables).sum()
    total = losses_BS.sum() / labels_in_step + balance + z + auxiliary
    mixture_of_depths = depth_counts(reports, world, tracker)
    if mixture_of_depths is not None:
        total = total + share * depth_auxiliary(reports, mixture_of_depths.tokens_L)
    return MicroLoss(
        total=total,
        nll_M=sums_by_modality(losses_BS, labels_BS, label_modality_BS, num_modalities),
        balance=balance.detach().to(torch.float64),
        z=z.detach().to(torch.float64),
        auxiliary=auxiliary.detach().to(torch.float64),
        counts=counts,
        mixture_of_depths=mixture_of_depths,
    )
