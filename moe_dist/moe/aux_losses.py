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


@dataclass(frozen=True)
class ColumnTables:
    """Constants of the groups on one device, made once: to make them in each step would be a host sync on CUDA.

    Attributes:
        groups: All groups, in logical order.
        group_C: int64, each column's group.
        member_CG: Whether a column belongs to a group, as 0 and 1.
        size_G: Columns of each group; n + m without free experts.
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
    kind: Literal["null_averaged", "vanilla"] = "null_averaged",
) -> Tensor:
    """This rank's share of the load-balance loss of each layer and group, [L, G], coefficient 1.

        l = (n + m) sum_i f_i P_i,   f_i = picks_i / T,   P_i = sum of probabilities / T

    with n + m the group's columns of all kinds. `null_averaged` is AdaMoE's loss (arXiv 2406.13233, section 3.2): each null
    column carries the mean load of all the group's null columns, and, as they too are copies of one another, each identity
    column that of the identity columns; constant experts differ, and each has its own. `vanilla` averages nothing.

    Args:
        prob_LC: This rank's probability sums, with gradient.
        choices_LC: Picks of each column over all ranks.
        tokens_LG: Tokens of each group over all ranks; a group without tokens contributes 0.
        tables: Of the groups, on the same device.
    """
    load_LC = choices_LC.to(prob_LC.dtype)
    if kind == "null_averaged":
        load_LC = _average_copies(load_LC, tables.groups)
    tokens_LC = tokens_LG.to(prob_LC.dtype).clamp_min(1.0)[:, tables.group_C]
    products_LC = load_LC / tokens_LC * prob_LC / tokens_LC
    return (products_LC @ tables.member_CG.to(prob_LC.dtype)) * tables.size_G.to(prob_LC.dtype)


def _average_copies(load_LC: Tensor, groups: Sequence[ExpertGroup]) -> Tensor:
    """The load with that of each group's null columns, and that of its identity columns, replaced by their mean."""
    at = sum(group.num_experts for group in groups)
    parts = [load_LC[:, :at]]
    for count in [group.num_null for group in groups] + [group.num_identity for group in groups]:
        if count:
            copies = load_LC[:, at : at + count]
            parts.append(copies.mean(dim=1, keepdim=True).expand_as(copies))
            at += count
    return torch.cat([*parts, load_LC[:, at:]], dim=1)


def z_terms(log_z_squared_LG: Tensor, tokens_LG: Tensor) -> Tensor:
    """This rank's share of each layer's router z-loss, [L], coefficient 1: mean over tokens of logsumexp(logits)^2.

    ST-MoE (arXiv 2202.08906, equation 5), with each token's logits those of its group. tokens_LG is over all ranks.
    """
    return log_z_squared_LG.sum(1) / tokens_LG.sum(1).to(log_z_squared_LG.dtype).clamp_min(1.0)
