"""The slow oracle: an MoE layer as loops over tokens and groups, on one device, obviously right.

It shares no code with the router, the dispatcher or the experts; tests hold those to it, values and gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


@dataclass(frozen=True)
class ReferenceWeights:
    """One group's weights: `true` [n, D], `null` [m, D] (or None), `gate`, `up` [n, F, D], `down` [n, D, F]."""

    true: Tensor
    null: Tensor | None
    gate: Tensor
    up: Tensor
    down: Tensor


def choose(logits: Sequence[float], num_true: int, top_k: int) -> list[int]:
    """The top-k columns of one token, best first; ties go to true experts, then to the lower index."""
    order = sorted(range(len(logits)), key=lambda column: (-logits[column], column >= num_true, column))
    return order[:top_k]


def weights_of(logits_C: Tensor, chosen: Sequence[int], num_true: int, normalise: str) -> dict[int, Tensor]:
    """Routing weight of each chosen true expert."""
    true = [column for column in chosen if column < num_true]
    if normalise == "none":
        return {column: logits_C.softmax(0)[column] for column in true}
    among = true if normalise == "true_chosen" else list(chosen)
    return {column: logits_C[column].exp() / logits_C[among].exp().sum() for column in true}


def moe_forward(
    h_TD: Tensor,
    group_T: Sequence[int],
    groups: Sequence[ExpertGroup],
    weights: Mapping[str, ReferenceWeights],
    *,
    normalise: str = "true_chosen",
    scale: float = 1.0,
) -> Tensor:
    """y_TD of the routed experts (no norm, no shared expert); zero for padding and for tokens that took no expert."""
    rows = []
    for token, group_index in enumerate(group_T):
        y_D = torch.zeros_like(h_TD[token])
        if group_index >= 0:
            group, w = groups[group_index], weights[groups[group_index].name]
            gate_rows = w.true if w.null is None else torch.cat([w.true, w.null])
            logits_C = gate_rows @ h_TD[token]
            chosen = choose(logits_C.tolist(), group.num_experts, group.top_k)
            for expert, weight in weights_of(logits_C, chosen, group.num_experts, normalise).items():
                hidden = torch.nn.functional.silu(w.gate[expert] @ h_TD[token]) * (w.up[expert] @ h_TD[token])
                y_D = y_D + scale * weight * (w.down[expert] @ hidden)
        rows.append(y_D)
    return torch.stack(rows) if rows else h_TD * 0.0


def balance_loss(logits_TC: Tensor, num_true: int, top_k: int, *, null_averaged: bool = True) -> Tensor:
    """Load-balance loss of one group in one layer, coefficient 1 (AdaMoE section 3.2; vanilla where not averaged).

    (n + m) sum_i f_i P_i with f_i the share of tokens that pick column i (so that the f_i sum to k) and P_i its mean
    probability; averaged, every null column carries the mean load of all null columns.
    """
    num_tokens, num_columns = logits_TC.shape
    picks = [0.0] * num_columns
    for row in logits_TC.tolist():
        for column in choose(row, num_true, top_k):
            picks[column] += 1.0
    load = [count / num_tokens for count in picks]
    if null_averaged and num_columns > num_true:
        mean = sum(load[num_true:]) / (num_columns - num_true)
        load = load[:num_true] + [mean] * (num_columns - num_true)
    prob_C = logits_TC.softmax(-1).mean(0)
    return num_columns * sum((f * p for f, p in zip(load, prob_C, strict=True)), start=logits_TC.new_zeros(()))


def expected_traffic(
    tokens: Sequence[int], experts: Sequence[int], rank_of_expert: Sequence[int], own_rank: int
) -> tuple[int, int]:
    """Remote rows and remote pairs of one rank for its taken pairs: the closed form of the dispatch contract."""
    remote = [(t, rank_of_expert[e]) for t, e in zip(tokens, experts, strict=True) if rank_of_expert[e] != own_rank]
    return len(set(remote)), len(remote)
