"""Balance and z terms from the layers' reports. Pure functions; the counts they take are already summed over all ranks.

Shape letters: L MoE layers, G groups, C choice columns (true experts by logical id, then each group's null experts).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_dist.moe.routing import group_columns
from moe_dist.placement.placement import ExpertGroup


def group_of_column(groups: Sequence[ExpertGroup], device: torch.device) -> Tensor:
    """int64 [C], each column's group."""
    columns = group_columns(tuple(g.num_experts for g in groups), tuple(g.num_null for g in groups))
    return torch.tensor(columns, device=device)


def balance_terms(
    prob_LC: Tensor,
    choices_LC: Tensor,
    tokens_LG: Tensor,
    groups: Sequence[ExpertGroup],
    *,
    kind: Literal["null_averaged", "vanilla"] = "null_averaged",
) -> Tensor:
    """This rank's share of the load-balance loss of each layer and group, [L, G], coefficient 1.

        l = (n + m) sum_i f_i P_i,   f_i = picks_i / T,   P_i = sum of probabilities / T

    `null_averaged` is AdaMoE's loss (arXiv 2406.13233, section 3.2): each null column carries the mean load of all the
    group's null columns; `vanilla` is the same over n + m columns without that.

    Args:
        prob_LC: This rank's probability sums, with gradient.
        choices_LC: Picks of each column over all ranks.
        tokens_LG: Tokens of each group over all ranks; a group without tokens contributes 0.
    """
    group_C = group_of_column(groups, prob_LC.device)
    load_LC = choices_LC.to(prob_LC.dtype)
    if kind == "null_averaged":
        load_LC = _average_nulls(load_LC, groups)
    tokens_LC = tokens_LG.to(prob_LC.dtype).clamp_min(1.0)[:, group_C]
    products_LC = load_LC / tokens_LC * prob_LC / tokens_LC
    sizes_G = torch.tensor([g.num_experts + g.num_null for g in groups], dtype=prob_LC.dtype, device=prob_LC.device)
    member_CG = (group_C[:, None] == torch.arange(len(groups), device=prob_LC.device)).to(prob_LC.dtype)
    return (products_LC @ member_CG) * sizes_G


def _average_nulls(load_LC: Tensor, groups: Sequence[ExpertGroup]) -> Tensor:
    at = sum(group.num_experts for group in groups)
    parts = [load_LC[:, :at]]
    for group in groups:
        if group.num_null:
            nulls = load_LC[:, at : at + group.num_null]
            parts.append(nulls.mean(dim=1, keepdim=True).expand_as(nulls))
            at += group.num_null
    return torch.cat(parts, dim=1)


def z_terms(log_z_squared_LG: Tensor, tokens_LG: Tensor) -> Tensor:
    """This rank's share of each layer's router z-loss, [L], coefficient 1: mean over tokens of logsumexp(logits)^2.

    ST-MoE (arXiv 2202.08906, equation 5), with each token's logits those of its group. tokens_LG is over all ranks.
    """
    return log_z_squared_LG.sum(1) / tokens_LG.sum(1).to(log_z_squared_LG.dtype).clamp_min(1.0)
