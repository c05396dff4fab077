"""The slow reference of expert choice loops over selection scopes, experts and tokens on one device.

It shares no code with the router. It takes the experts' outputs from tests/reference/layer.py.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup
from tests.reference.layer import ReferenceWeights, expert_output

Pairs = set[tuple[int, int]]  # (token, logical expert)


def room(capacity: float, tokens: int) -> int:
    """Returns ceil(c T), at most T. A product c T within 5e-7 of an integer counts as this integer."""
    return min(tokens, math.ceil(round(capacity * tokens, 6)))


def choice_of_training(
    logits_TE: Sequence[Sequence[float]],
    group_T: Sequence[int],
    groups: Sequence[ExpertGroup],
    capacity_G: Sequence[float],
    choice_sets: Sequence[Sequence[int]],
) -> Pairs:
    """In each selection scope every expert takes the tokens with the highest scores. On a tie it takes the earlier
    token."""
    pairs: Pairs = set()
    for tokens in choice_sets:
        for index, group in enumerate(groups):
            members = [token for token in tokens if group_T[token] == index]
            for expert in group.experts:
                best = sorted(members, key=lambda token: (-logits_TE[token][expert], token))
                pairs |= {(token, expert) for token in best[: room(capacity_G[index], len(members))]}
    return pairs


def cut_of(scores: Sequence[float], capacity: float) -> float:
    """Returns the k-th largest score of one expert in one scope, or 0 if the expert takes all tokens."""
    if capacity >= 1 or not scores:
        return 0.0
    return sorted(scores, reverse=True)[room(capacity, len(scores)) - 1]


def choice_by_score(
    scores_TE: Sequence[Sequence[float]], group_T: Sequence[int], groups: Sequence[ExpertGroup], bound_E: Sequence[float]
) -> Pairs:
    """Returns for each token the experts of its group whose score is above the expert's bound. Tokens do not compete."""
    return {
        (token, expert)
        for token, index in enumerate(group_T)
        if index >= 0
        for expert in groups[index].experts
        if scores_TE[token][expert] > bound_E[expert]
    }


def logits_of(h_TD: Tensor, groups: Sequence[ExpertGroup], weights: Mapping[str, ReferenceWeights]) -> Tensor:
    """Returns the logits [T, E]: every expert's logit for every token, also if the expert is not in the token's group."""
    rows = [weights[group.name].true[column] for group in groups for column in range(group.num_experts)]
    return torch.stack([torch.stack([row @ token for row in rows]) for token in h_TD])


def moe_forward(
    h_TD: Tensor,
    pairs: Pairs,
    group_T: Sequence[int],
    groups: Sequence[ExpertGroup],
    weights: Mapping[str, ReferenceWeights],
    *,
    noise_TE: Tensor | None = None,
) -> Tensor:
    """Returns y_TD. A token's row is the sum over its experts of sigmoid(logit + noise) times the expert's output. It
    is 0 for a token without experts."""
    rows = []
    for token in range(len(group_T)):
        y_D = torch.zeros_like(h_TD[token])
        for taken, expert in sorted(pairs):
            if taken == token:
                group = groups[group_T[token]]
                w, column = weights[group.name], expert - group.first_expert
                logit = w.true[column] @ h_TD[token]
                noise = 0.0 if noise_TE is None else noise_TE[token, expert]
                y_D = y_D + (logit + noise).sigmoid() * expert_output(h_TD[token], column, group, w)
        rows.append(y_D)
    return torch.stack(rows) if rows else h_TD * 0.0


def auxiliary_loss(logits_TE: Tensor, pairs: Pairs, group_T: Sequence[int], groups: Sequence[ExpertGroup]) -> Tensor:
    """Returns one layer's loss, summed over the groups. A group's loss is the mean over its tokens and experts of -log
    p(decision), with p = sigmoid(logit)."""
    total = logits_TE.new_zeros(())
    for index, group in enumerate(groups):
        members = [token for token, of in enumerate(group_T) if of == index]
        for token in members:
            for expert in group.experts:
                logit = logits_TE[token, expert]
                p = (logit if (token, expert) in pairs else -logit).sigmoid()
                total = total - p.log() / (len(members) * group.num_experts)
    return total
