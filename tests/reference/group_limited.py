"""The slow reference of the group-limited router loops over tokens. It shares no code with the router."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


def limited_choice(scores: Sequence[float], group: ExpertGroup, *, n_group: int, topk_group: int) -> list[int]:
    """Returns one token's chosen columns, best first. `scores` are the token's biased scores of the group's columns, in
    the order true, null, identity, constant. On a tie the earlier column or the earlier node group wins."""
    size = group.num_experts // n_group
    members = [range(index * size, (index + 1) * size) for index in range(n_group)]
    value = [sum(sorted((scores[expert] for expert in each), reverse=True)[:2]) for each in members]
    nodes = sorted(range(n_group), key=lambda index: (-value[index], index))[:topk_group]
    open_columns = [expert for index in nodes for expert in members[index]]
    open_columns += range(group.num_experts, group.num_columns)
    return sorted(open_columns, key=lambda column: (-scores[column], column))[: group.top_k]


def limited_weights(
    logits_C: Tensor,
    bias_C: Tensor | None,
    group: ExpertGroup,
    *,
    n_group: int,
    topk_group: int,
    normalise: bool = True,
    scale: float = 1.0,
) -> dict[int, Tensor]:
    """Returns the weight of each column that one token takes, without null columns. `logits_C` are the token's logits
    of the group's columns."""
    score_C = logits_C.sigmoid()
    biased = (score_C if bias_C is None else score_C + bias_C).tolist()
    null = range(group.num_experts, group.num_experts + group.num_null)
    kept = [c for c in limited_choice(biased, group, n_group=n_group, topk_group=topk_group) if c not in null]
    total = sum((score_C[column] for column in kept), start=torch.zeros_like(score_C[0])) + 1e-20 if normalise else 1.0
    return {column: scale * score_C[column] / total for column in kept}


def limited_balance_loss(
    logits_TC: Tensor, biased_TC: Tensor, group: ExpertGroup, *, n_group: int, topk_group: int
) -> Tensor:
    """Returns the vanilla balance loss of one group with coefficient 1, C sum_i f_i P_i, where P_i is the mean over
    tokens of s_i / sum_j s_j."""
    num_tokens, num_columns = logits_TC.shape
    picks = [0.0] * num_columns
    for scores in biased_TC.tolist():
        for column in limited_choice(scores, group, n_group=n_group, topk_group=topk_group):
            picks[column] += 1.0 / num_tokens
    score_TC = logits_TC.sigmoid()
    prob_C = (score_TC / score_TC.sum(-1, keepdim=True)).mean(0)
    return num_columns * sum((f * p for f, p in zip(picks, prob_C, strict=True)), start=logits_TC.new_zeros(()))
