"""The slow reference of an MoE layer loops over tokens and groups on one device.

It shares no code with the router, the dispatcher or the experts. Tests compare the layer's values and gradients with
this reference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.placement.placement import ExpertGroup


@dataclass(frozen=True)
class ReferenceWeights:
    """One group's weights. `true` [n, D], `null` [m, D], `identity` and `constant` are the router rows. `gate`, `up`
    [n, F, D] and `down` [n, D, F] are the experts' weights. `vector` [c, D] and `mix` [c, 2, D] belong to the constant
    experts. `bias` is the selection bias of all columns."""

    true: Tensor
    null: Tensor | None
    gate: Tensor
    up: Tensor
    down: Tensor
    identity: Tensor | None = None
    constant: Tensor | None = None
    vector: Tensor | None = None
    mix: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Returns the router rows of all columns of the group: true, null, identity, constant."""
        kinds = (self.true, self.null, self.identity, self.constant)
        return torch.cat([rows for rows in kinds if rows is not None])


def choose(scores: Sequence[float], num_true: int, top_k: int) -> list[int]:
    """Returns the top-k columns of one token, best first. Ties go to true experts, then to the lower index."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column >= num_true, column))
    return order[:top_k]


def weights_of(
    logits_C: Tensor, chosen: Sequence[int], num_true: int, normalise: str, *, num_null: int | None = None
) -> dict[int, Tensor]:
    """Returns the routing weight of each chosen column that is not null. Null columns are [num_true, num_true +
    num_null); without `num_null` all columns after the true ones are null."""
    first_zero_computation = len(logits_C) if num_null is None else num_true + num_null
    kept = [column for column in chosen if column < num_true or column >= first_zero_computation]
    if normalise == "none":
        return {column: logits_C.softmax(0)[column] for column in kept}
    if normalise == "true_all":
        not_null = [column for column in range(len(logits_C)) if column < num_true or column >= first_zero_computation]
        return {column: logits_C[column].exp() / logits_C[not_null].exp().sum() for column in kept}
    among = kept if normalise == "true_chosen" else list(chosen)
    return {column: logits_C[column].exp() / logits_C[among].exp().sum() for column in kept}


def kept_pairs(pairs: Sequence[tuple[int, int, float]], capacity: Mapping[int, int], drop: str) -> set[tuple[int, int]]:
    """Returns the (token, expert) pairs that remain after the drops by capacity.

    `pairs` lists (token, expert, probability) for each choice in one selection scope. An expert serves its pairs one
    after the other until it is full. With `drop="probability"` it starts with the most probable pair, otherwise with
    the pair of the earliest token.
    """
    kept: set[tuple[int, int]] = set()
    for expert, room in capacity.items():
        mine = [(token, probability) for token, of, probability in pairs if of == expert]
        mine.sort(key=lambda pair: (-pair[1], pair[0]) if drop == "probability" else pair[0])
        kept |= {(token, expert) for token, _ in mine[:room]}
    return kept


def expert_output(x_D: Tensor, column: int, group: ExpertGroup, w: ReferenceWeights) -> Tensor:
    """Returns the output of a true, identity or constant column of the group for one token."""
    if column < group.num_experts:
        hidden_F = torch.nn.functional.silu(w.gate[column] @ x_D) * (w.up[column] @ x_D)
        return w.down[column] @ hidden_F
    free = column - group.num_experts - group.num_null
    if free < group.num_identity:
        return x_D
    constant = free - group.num_identity
    shares = (w.mix[constant] @ x_D).softmax(0)
    return shares[0] * x_D + shares[1] * w.vector[constant]


def moe_forward(
    h_TD: Tensor,
    group_T: Sequence[int],
    groups: Sequence[ExpertGroup],
    weights: Mapping[str, ReferenceWeights],
    *,
    normalise: str = "true_chosen",
    scale: float = 1.0,
    capacity: tuple[float, str] | None = None,
) -> Tensor:
    """Returns y_TD of the routed and zero-computation experts, without norm and shared expert. It is zero for padding and
    for tokens without an expert.

    Args:
        capacity: The capacity factor and the order of drops (`probability` or `position`); None drops no choices.
    """
    chosen: dict[int, dict[int, Tensor]] = {}
    probability: dict[int, Tensor] = {}
    for token, group_index in enumerate(group_T):
        if group_index >= 0:
            group, w = groups[group_index], weights[groups[group_index].name]
            logits_C = w.rows @ h_TD[token]
            probability[token] = logits_C.softmax(0)
            scores = logits_C if w.bias is None or not w.bias.any() else probability[token] + w.bias
            columns = choose(scores.tolist(), group.num_experts, group.top_k)
            chosen[token] = weights_of(logits_C, columns, group.num_experts, normalise, num_null=group.num_null)
    if capacity is not None:
        _drop(group_T, groups, chosen, probability, capacity)
    rows = []
    for token in range(len(group_T)):
        y_D = torch.zeros_like(h_TD[token])
        for column, weight in chosen.get(token, {}).items():
            group = groups[group_T[token]]
            y_D = y_D + scale * weight * expert_output(h_TD[token], column, group, weights[group.name])
        rows.append(y_D)
    return torch.stack(rows) if rows else h_TD * 0.0


def _drop(
    group_T: Sequence[int],
    groups: Sequence[ExpertGroup],
    chosen: dict[int, dict[int, Tensor]],
    probability: Mapping[int, Tensor],
    capacity: tuple[float, str],
) -> None:
    """Removes the dropped choices from `chosen`."""
    factor, drop = capacity
    for index, group in enumerate(groups):
        members = [token for token, own in enumerate(group_T) if own == index]
        share = factor * group.top_k * len(members) / group.num_columns
        room = dict.fromkeys(range(group.num_experts), math.ceil(share - 1e-9))
        pairs = [
            (token, column, float(probability[token][column].detach()))
            for token in members
            for column in chosen[token]
            if column < group.num_experts
        ]
        kept = kept_pairs(pairs, room, drop)
        for token, column, _ in pairs:
            if (token, column) not in kept:
                del chosen[token][column]


def balance_loss(
    logits_TC: Tensor,
    num_true: int,
    top_k: int,
    *,
    null_averaged: bool = True,
    num_null: int | None = None,
    num_identity: int = 0,
    null_weight: float = 1.0,
) -> Tensor:
    """Returns the balance loss of one group in one layer with coefficient 1 (AdaMoE section 3.2, or vanilla without
    averaging).

    The loss is (n + m) sum_i f_i P_i. f_i is the share of tokens that choose column i, so the f_i sum to k. P_i is the
    mean probability of column i. With averaging, every null column has the mean load of all null columns, and every
    identity column the mean load of the identity columns. Without `num_null` all columns after the true ones are null.
    With a null weight w, a null column counts as w columns, and its load is divided by w.
    """
    num_tokens, num_columns = logits_TC.shape
    load = [count / num_tokens for count in picks_of(logits_TC, num_true, top_k)]
    size: float = num_columns
    if null_averaged:
        first_identity = num_columns if num_null is None else num_true + num_null
        for copies in (range(num_true, first_identity), range(first_identity, first_identity + num_identity)):
            mean = sum(load[column] for column in copies) / max(1, len(copies))
            for column in copies:
                load[column] = mean
        for column in range(num_true, first_identity):
            load[column] /= null_weight
        size += (first_identity - num_true) * (null_weight - 1.0)
    prob_C = logits_TC.softmax(-1).mean(0)
    return size * sum((f * p for f, p in zip(load, prob_C, strict=True)), start=logits_TC.new_zeros(()))


def picks_of(logits_TC: Tensor, num_true: int, top_k: int) -> list[float]:
    """Returns for each column the number of tokens that have it among their top k."""
    picks = [0.0] * logits_TC.shape[1]
    for row in logits_TC.tolist():
        for column in choose(row, num_true, top_k):
            picks[column] += 1.0
    return picks


def split_loss(logits_TC: Tensor, num_true: int, top_k: int, *, null_weight: float = 1.0) -> Tensor:
    """Returns ZEDA's L_GA (arXiv 2605.18643) of one group in one layer with coefficient 1.

    It depends only on how choices divide between the true columns (E) and all others (Z): (n + n_Z w) / k (f_E P_E / n
    + f_Z P_Z / (n_Z w)). f_E and P_E are sums over the true columns, f_Z and P_Z are sums over all other columns.
    """
    num_tokens, num_columns = logits_TC.shape
    load = [count / num_tokens for count in picks_of(logits_TC, num_true, top_k)]
    prob_C = logits_TC.softmax(-1).mean(0)
    total = sum(load[:num_true]) * prob_C[:num_true].sum() / num_true
    zero = (num_columns - num_true) * null_weight
    if zero:
        total = total + sum(load[num_true:]) * prob_C[num_true:].sum() / zero
    return (num_true + zero) / top_k * total


def bias_steps(
    bias_n: Sequence[float],
    choices_n: Sequence[int],
    tokens: int,
    *,
    top_k: int,
    target: float | None = None,
    rate: float = 0.0,
    per_expert: bool = False,
    sign_rate: float = 0.0,
    others: bool = True,
) -> list[float]:
    """Returns the biases of one group's true experts in one layer after one step of its controllers.

    The first controller is LongCat-Flash's rule with a target. It moves each expert by its own error (`per_expert`, as
    published), or all experts by the mean error. The second is DeepSeek-V3's sign rule. If the group also has columns
    that are not true (`others`), the mean of the signs is subtracted. Without tokens the biases do not change.
    """
    n, moved = len(bias_n), list(bias_n)
    if tokens == 0:
        return moved
    errors = [0.0 if target is None else target / (top_k * n) - count / (top_k * tokens) for count in choices_n]
    if not per_expert:
        errors = [sum(errors) / n] * n
    mean = sum(choices_n) / n
    signs = [(mean > count) - (mean < count) for count in choices_n]
    common = sum(signs) / n if others else 0.0
    return [b + rate * e + sign_rate * (s - common) for b, e, s in zip(moved, errors, signs, strict=True)]


def expected_traffic(
    tokens: Sequence[int], experts: Sequence[int], rank_of_expert: Sequence[int], own_rank: int
) -> tuple[int, int]:
    """Returns how many rows and pairs one rank sends for its taken pairs, by the closed form of the dispatch contract."""
    remote = [(t, rank_of_expert[e]) for t, e in zip(tokens, experts, strict=True) if rank_of_expert[e] != own_rank]
    return len(set(remote)), len(remote)


def expected_node_traffic(
    tokens_W: Sequence[Sequence[int]],
    experts_W: Sequence[Sequence[int]],
    rank_of_expert: Sequence[int],
    *,
    ranks_per_node: int,
    own_rank: int,
) -> tuple[int, int]:
    """Returns how many rows one rank sends to other nodes, and how many inside its node, under hierarchical dispatch.

    To other nodes it sends one row for each distinct pair (own token, other node). Inside its node it sends its own
    tokens, and the tokens that it received from the ranks with its local rank on the other nodes. It sends one row for
    each distinct pair (token, other rank of the node).

    Args:
        tokens_W, experts_W: Tokens and experts of the pairs that each rank of the EP group takes.
    """
    node, local = divmod(own_rank, ranks_per_node)

    def legs(rank: int) -> set[tuple[int, int]]:
        return {(t, rank_of_expert[e]) for t, e in zip(tokens_W[rank], experts_W[rank], strict=True)}

    crossing = {(t, to // ranks_per_node) for t, to in legs(own_rank) if to // ranks_per_node != node}
    inside = [
        (source, t, to)
        for source in range(local, len(tokens_W), ranks_per_node)
        for t, to in legs(source)
        if to // ranks_per_node == node and to != own_rank
    ]
    return len(crossing), len(inside)
