"""Balance and z terms from the layers' reports. Pure functions; the counts they take are already summed over all ranks.

Shape letters: L MoE layers, G groups, C choice columns (true experts by logical id, then the groups' null, identity and
constant experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe_dist.moe.routing import group_columns
from moe_dist.placement.placement import ExpertGroup

BalanceKind = Literal["null_averaged", "vanilla", "null_split"]


@dataclass(frozen=True)
class ColumnTables:
    """Constants of the groups on one device, made once: to make them in each step would be a host sync on CUDA.

    Attributes:
        groups: All groups, in logical order.
        group_C: int64, each column's group.
        member_CG: Whether a column belongs to a group, as 0 and 1.
        size_G: Columns of each group; n + m without zero-computation experts.
    """

    groups: tuple[ExpertGroup, ...]
    group_C: Tensor
    member_CG: Tensor
    size_G: Tensor

    @classmethod
    def on(cls, groups: Sequence[ExpertGroup], device: torch.device) -> "ColumnTables":
        """The tables of `groups` on `device`."""
        group_C = torch.tensor(group_columns(groups), device=device)
        member_CG = group_C[:, None] == torch.arange(len(groups), device=device)
        sizes = [group.num_columns for group in groups]
        return cls(tuple(groups), group_C, member_CG, torch.tensor(sizes, device=device))


def balance_terms(
    prob_LC: Tensor,
    choices_LC: Tensor,
    tokens_LG: Tensor,
    tables: ColumnTables,
    *,
    kind: BalanceKind = "null_averaged",
    null_weight_G: Sequence[float] | None = None,
) -> Tensor:
    """This rank's share of the load-balance loss of each layer and group, [L, G], coefficient 1.

        l = (n + m) sum_i f_i P_i,   f_i = picks_i / T,   P_i = sum of probabilities / T

    with n + m the group's columns of all kinds. `null_averaged` is AdaMoE's loss (arXiv 2406.13233, section 3.2): each null
    column carries the mean load of all the group's null columns, and, as they too are copies of one another, each identity
    column that of the identity columns; constant experts differ, and each has its own. `vanilla` averages nothing.

    `null_split` regulates nothing but how choices divide between the true columns (E) and all others (Z), of which there
    are n_Z (ZEDA, arXiv 2605.18643); an even choice has the value 1, not k, as in the source:

        l = (n + n_Z w) / k (f_E P_E / n + f_Z P_Z / (n_Z w))

    A null weight w moves the split at which a loss is even: a null column is to carry w times a true one's load, so that a
    token takes k n / (n + m w) true experts (ZEDA's w; LongCat-Flash scales its loss to its target likewise).

    Args:
        prob_LC: This rank's probability sums, with gradient.
        choices_LC: Picks of each column over all ranks.
        tokens_LG: Tokens of each group over all ranks; a group without tokens contributes 0.
        tables: Of the groups, on the same device.
        null_weight_G: w of each group; None for 1. `vanilla` knows none.
    """
    load_LC, groups = choices_LC.to(prob_LC.dtype), tables.groups
    weight_G = [1.0] * len(groups) if null_weight_G is None else null_weight_G
    if kind == "null_split":
        return _split_terms(prob_LC, load_LC, tokens_LG.to(prob_LC.dtype).clamp_min(1.0), tables, weight_G)
    if kind == "null_averaged":
        load_LC = _average_copies(load_LC, groups, weight_G)
    tokens_LC = tokens_LG.to(prob_LC.dtype).clamp_min(1.0)[:, tables.group_C]
    products_LC = load_LC / tokens_LC * prob_LC / tokens_LC
    sums_LG = products_LC @ tables.member_CG.to(prob_LC.dtype)
    if kind == "vanilla" or null_weight_G is None:
        return sums_LG * tables.size_G.to(prob_LC.dtype)
    sizes = [group.num_columns + group.num_null * (w - 1.0) for group, w in zip(groups, weight_G, strict=True)]
    return _scaled(sums_LG, sizes)


def _average_copies(load_LC: Tensor, groups: Sequence[ExpertGroup], weight_G: Sequence[float]) -> Tensor:
    """The load with that of each group's null columns, over their weight, and that of its identity columns, replaced by
    their mean."""
    at = sum(group.num_experts for group in groups)
    parts = [load_LC[:, :at]]
    counts = [group.num_null for group in groups] + [group.num_identity for group in groups]
    for count, weight in zip(counts, [*weight_G, *([1.0] * len(groups))], strict=True):
        if count:
            copies = load_LC[:, at : at + count]
            parts.append(copies.mean(dim=1, keepdim=True).expand_as(copies) / weight)
            at += count
    return torch.cat([*parts, load_LC[:, at:]], dim=1)


def _split_terms(
    prob_LC: Tensor, load_LC: Tensor, tokens_LG: Tensor, tables: ColumnTables, weight_G: Sequence[float]
) -> Tensor:
    """`null_split`, see `balance_terms`; a group without other columns has a constant."""
    num_true = sum(group.num_experts for group in tables.groups)
    member_CG = tables.member_CG.to(prob_LC.dtype)
    terms_LG = torch.zeros_like(tokens_LG)
    zero_G = [(group.num_columns - group.num_experts) * w for group, w in zip(tables.groups, weight_G, strict=True)]
    sizes = ([group.num_experts for group in tables.groups], zero_G)
    for part, size_G in zip((slice(0, num_true), slice(num_true, None)), sizes, strict=True):
        products_LG = (load_LC[:, part] @ member_CG[part]) * (prob_LC[:, part] @ member_CG[part]) / tokens_LG / tokens_LG
        terms_LG = terms_LG + _scaled(products_LG, [1.0 / size if size else 0.0 for size in size_G])
    factors = [(g.num_experts + zero) / g.top_k for g, zero in zip(tables.groups, zero_G, strict=True)]
    return _scaled(terms_LG, factors)


def _scaled(values_LG: Tensor, factor_G: Sequence[float]) -> Tensor:
    """Each group's values times a number of the host: a tensor made of them would be a sync on CUDA."""
    return torch.stack([values_L * factor for values_L, factor in zip(values_LG.unbind(1), factor_G, strict=True)], dim=1)


def z_terms(log_z_squared_LG: Tensor, tokens_LG: Tensor) -> Tensor:
    """This rank's share of each layer's router z-loss, [L], coefficient 1: mean over tokens of logsumexp(logits)^2.

    ST-MoE (arXiv 2202.08906, equation 5), with each token's logits those of its group. tokens_LG is over all ranks.
    """
    return log_z_squared_LG.sum(1) / tokens_LG.sum(1).to(log_z_squared_LG.dtype).clamp_min(1.0)
