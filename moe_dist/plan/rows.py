"""Computes the rows and (token, expert) pairs of each rank in a micro-batch, either expected from the configuration or
drawn from a trace. Imports no torch.

A row is a distinct pair of a token and a rank that computes at least one of the token's experts. Shape letters: S draws of
a micro-batch, L MoE layers (1 if all are alike), R ranks of an EP group, Q traced sequences, T traced tokens, E true
experts, K choices, G groups.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from moe_dist.placement.placement import ExpertGroup, ExpertPlacement, group_shares
from moe_dist.plan.rates import Mark

# The number of exchanges of a row in forward and backward: dispatch, combine, the gradients of both, and exchanges that
# recomputation repeats.
EXCHANGES = {"none": 4, "experts": 4, "block": 5}
DRAWS = 16  # number of micro-batches that are drawn from a trace


class Hop(NamedTuple):
    """The rows of one exchange, by the nodes on which the ranks really are. All arrays are [S, L, R].

    Attributes:
        inside, between: Number of rows that a rank sends or, if more, receives: inside its node, and between nodes.
        sent_inside, sent_between: Number of rows that a rank sends inside its node, and to other nodes. Their sums give the
            bytes.
    """

    inside: np.ndarray
    between: np.ndarray
    sent_inside: np.ndarray
    sent_between: np.ndarray


@dataclass(frozen=True)
class Load:
    """The rows that each rank sends and computes, and the (token, expert) pairs that it computes, for one micro-batch. All
    arrays except `spread` are [S, L, R].

    Attributes:
        hops: The exchanges of one dispatch: one, or two with the dispatcher `hierarchical`.
        rows: Number of rows that the rank computes, including rows of its own tokens.
        pairs, own: Number of (token, expert) pairs that the rank computes, for all tokens and for its own tokens.
        work: Sum of the FFN widths over the (token, expert) pairs that the rank computes.
        spread: Standard deviation over micro-batches of a rank's mean number of rows, and of pairs, per layer, [2, R].
    """

    hops: tuple[Hop, ...]
    rows: np.ndarray
    pairs: np.ndarray
    own: np.ndarray
    work: np.ndarray
    spread: np.ndarray
    mark: Mark

    @property
    def sent(self) -> np.ndarray:
        """Returns the number of rows that each rank sends in all hops."""
        return sum((hop.sent_inside + hop.sent_between for hop in self.hops), np.zeros(1))


@dataclass(frozen=True)
class Wire:
    """Determines which rows a dispatcher sends, and which of them leave a node.

    Attributes:
        node: Number of ranks in a node.
        once: Number of consecutive ranks to which the dispatcher `hierarchical` sends a token only once. It divides the
            number of ranks. None for other dispatchers.
        each_pair: True if each (token, expert) pair is sent as a separate row.
        first: Position in its node of the EP group's first rank.
    """

    node: int
    once: int | None = None
    each_pair: bool = False
    first: int = 0

    def nodes(self, ranks: int) -> np.ndarray:
        """Returns the node of each rank of an EP group, counted from the node of its first rank, [R]."""
        return (self.first + np.arange(ranks)) // self.node

    def parts(self, ranks: int) -> np.ndarray:
        """Returns the index of the ranks to which a token is sent only once, for each rank of an EP group, [R]."""
        return np.arange(ranks) // (self.once or ranks)


def group_starts(ep: int, edp: int, node: int) -> dict[int, int]:
    """Maps each position in a node to the number of EP groups that begin there, for `edp` groups of `ep` consecutive ranks.
    Groups that stay in one node count as position 0, because they all exchange in the same way."""
    firsts = (group * ep % node for group in range(edp))
    return dict(Counter(first if first + ep > node else 0 for first in firsts))


def crossing_groups(ep: int, edp: int, node: int) -> list[int]:
    """Returns the indices of the EP groups whose ranks are on more than one node, for `edp` groups of `ep` consecutive
    ranks."""
    return [group for group in range(edp) if group * ep // node != (group * ep + ep - 1) // node]


@cache
def ranks_sharing_a_node(stride: int, count: int, node: int) -> int:
    """Returns the smallest number of ranks that share a node in any ring of the `count` ranks p, p + stride, p + 2 stride,
    ..., for each p < stride. It is `count` if no ring leaves a node, and smaller otherwise."""
    node_PC = (np.arange(stride)[:, None] + stride * np.arange(count)) // node
    return min(int(np.unique(node_C, return_counts=True)[1].min()) for node_C in node_PC)


class Expected:
    """Computes loads under uniform routing, with which `moe_dist.plan.planner` compares placements."""

    mark: Mark = "extrapolated"

    def __init__(self, token_mix: Mapping[str, int]) -> None:
        self.token_mix = token_mix

    def load(self, placement: ExpertPlacement, wire: Wire, *, tokens: int, layers: int) -> Load:
        """Returns the expected load. For `spread`, tokens are assumed to choose experts independently. With more `layers`,
        the spread of the mean over layers is smaller."""
        groups, ranks = placement.groups, placement.num_ranks
        share_G = np.array(group_shares(groups, self.token_mix))
        here_RG = np.array([[len(placement.local_experts(rank, group)) for group in groups] for rank in range(ranks)])
        taken_G = np.array([g.expected_experts_per_token / g.num_experts for g in groups])
        pair_RG = share_G * taken_G * here_RG  # mean number of pairs per token, by group and by the experts' rank
        row_R = pair_RG.sum(1) if wire.each_pair else _reached(groups, share_G, here_RG)
        parts = wire.parts(ranks)
        part_P = _reached(groups, share_G, np.stack([here_RG[parts == part].sum(0) for part in range(parts[-1] + 1)]))
        hops = _hops(np.tile(tokens * row_R, (ranks, 1)), np.tile(tokens * part_P, (ranks, 1)), wire)
        widths = np.array([group.ffn_dim for group in groups], float)
        chance_R, taken_R = _reached(groups, share_G, here_RG), pair_RG.sum(1)
        several_R = np.array([_pair_variance(groups, share_G, here) for here in here_RG])
        spread = np.sqrt(ranks * tokens * np.stack([chance_R * (1 - chance_R), several_R]) / max(1, layers))
        shape = (1, 1, ranks)
        return Load(
            tuple(Hop(*(each.reshape(shape) for each in hop)) for hop in hops),
            rows=(ranks * tokens * chance_R).reshape(shape),
            pairs=(ranks * tokens * taken_R).reshape(shape),
            own=(tokens * taken_R).reshape(shape),
            work=(ranks * tokens * pair_RG @ widths).reshape(shape),
            spread=spread,
            mark=self.mark,
        )


def _reached(groups: Sequence[ExpertGroup], share_G: np.ndarray, here_XG: np.ndarray) -> np.ndarray:
    """Returns, for each row of `here_XG`, the probability that a token takes at least one of its experts."""
    return np.array([sum(s * g.reached(int(n)) for g, s, n in zip(groups, share_G, here, strict=True)) for here in here_XG])


def _pair_variance(groups: Sequence[ExpertGroup], share_G: np.ndarray, here_G: np.ndarray) -> float:
    """Returns the variance of the number of experts in `here_G` that one token takes. The distribution is hypergeometric.
    In expert choice the variance is 0, because experts take fixed numbers of tokens."""
    mean = square = 0.0
    for group, share, here in zip(groups, share_G, here_G, strict=True):
        if group.token_share is not None:
            continue
        chance, columns = here / group.num_columns, group.num_columns
        each = group.top_k * chance * (1 - chance) * (columns - group.top_k) / max(1, columns - 1)
        mean += share * group.top_k * chance
        square += share * (each + (group.top_k * chance) ** 2)
    return max(0.0, square - mean**2)


def _hops(rows_RR: np.ndarray, parts_RP: np.ndarray, wire: Wire) -> list[Hop]:
    """Returns the exchanges of one dispatch, with arrays [R].

    Args:
        rows_RR: Number of rows from each rank (first axis) to each rank (second axis).
        parts_RP: Number of tokens of each rank that take an expert on each part (see `Wire.parts`).
    """
    ranks = len(rows_RR)
    if wire.once is None:
        return [_hop(rows_RR, wire)]
    # A row first goes to the rank with the sender's index in the receiving part. This rank sends it on inside its part.
    part_R, local_R = wire.parts(ranks), np.arange(ranks) % wire.once
    first_RR = np.zeros((ranks, ranks))
    for part in range(parts_RP.shape[1]):
        first_RR[np.arange(ranks), part * wire.once + local_R] = parts_RP[:, part]
    onward_OR = rows_RR.reshape(-1, wire.once, ranks).sum(0)
    second_RR = np.where(part_R[:, None] == part_R, onward_OR[local_R], 0.0)
    return [_hop(first_RR, wire), _hop(second_RR, wire)]


def _hop(rows_RR: np.ndarray, wire: Wire) -> Hop:
    node_R = wire.nodes(len(rows_RR))
    same_RR = node_R[:, None] == node_R
    near_RR, far_RR = np.where(same_RR & ~np.eye(len(rows_RR), dtype=bool), rows_RR, 0.0), np.where(same_RR, 0.0, rows_RR)
    near_R, far_R = near_RR.sum(1), far_RR.sum(1)
    return Hop(np.maximum(near_R, near_RR.sum(0)), np.maximum(far_R, far_RR.sum(0)), near_R, far_R)


class Traced:
    """Draws loads from a trace's tokens. In each draw, each rank gets random whole sequences of the trace, with repetition.

    Args:
        ids_TLK, sequence_T: Columns as in `moe_dist.monitor.trace.format`, and the index of each token's sequence.
    """

    mark: Mark = "fitted"

    def __init__(self, ids_TLK: np.ndarray, sequence_T: np.ndarray, seed: int = 0) -> None:
        order = np.argsort(sequence_T, kind="stable")
        self.ids_TLK, self.seed = ids_TLK[order], seed
        _, first_Q, self.tokens_Q = np.unique(sequence_T[order], return_index=True, return_counts=True)
        self.first_Q = first_Q

    @cached_property
    def _sequence_of_token(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.first_Q)), self.tokens_Q)

    def pairs_of_experts(self, num_experts: int) -> np.ndarray:
        """Returns how many tokens of each sequence chose each true expert, [Q, L, E], without dropped and null choices."""
        found = np.zeros((len(self.first_Q), self.ids_TLK.shape[1], num_experts))
        token, layer, place = np.nonzero((self.ids_TLK >= 0) & (self.ids_TLK < num_experts))
        np.add.at(found, (self._sequence_of_token[token], layer, self.ids_TLK[token, layer, place]), 1)
        return found

    def rows(self, part_E: np.ndarray) -> np.ndarray:
        """Returns how many tokens of each sequence take an expert of each part (rank or node), [Q, L, parts]."""
        parts, layers = int(part_E.max()) + 1, self.ids_TLK.shape[1]
        found = np.zeros((len(self.first_Q), layers, parts))
        part_C = np.append(part_E, parts)  # the last column stands for null, dropped and missing choices
        for layer in range(layers):
            ids_TK = self.ids_TLK[:, layer]
            goes_TP = np.zeros((len(ids_TK), parts + 1), bool)
            column_TK = np.where((ids_TK >= 0) & (ids_TK < len(part_E)), ids_TK, len(part_E))
            goes_TP[np.arange(len(ids_TK))[:, None], part_C[column_TK]] = True
            found[:, layer] = np.add.reduceat(goes_TP[:, :parts], self.first_Q, axis=0, dtype=float)
        return found

    def load(self, placement: ExpertPlacement, wire: Wire, *, tokens: int, layers: int) -> Load:
        """Returns the loads of `DRAWS` micro-batches. For the arguments see `Expected.load`."""
        del layers
        ranks = placement.num_ranks
        rank_E = np.array(placement.rank_of_expert)
        on_ER = (rank_E[:, None] == np.arange(ranks)).astype(float)
        width_E = np.array(placement.width_of_expert, float)
        pairs_QLE = self.pairs_of_experts(placement.num_experts)
        pairs_QLR, work_QLR = pairs_QLE @ on_ER, (pairs_QLE * width_E) @ on_ER
        reach_QLR, parts_QLP = self.rows(rank_E), self.rows(wire.parts(ranks)[rank_E])
        rows_QLR = pairs_QLR if wire.each_pair else reach_QLR
        rng = np.random.default_rng(self.seed)
        found: list[list[np.ndarray]] = [[] for _ in range(4)]
        levels: list[list[list[Hop]]] = []  # by draw, layer and hop
        sequences = max(1, round(tokens / self.tokens_Q.mean()))  # number of sequences in a rank's micro-batch
        for _ in range(DRAWS):
            drawn_RM = rng.integers(0, len(self.first_Q), (ranks, sequences))
            scale_R11 = (tokens / self.tokens_Q[drawn_RM].sum(1))[:, None, None]
            rows_RLR, parts_RLP, pairs_RLR, work_RLR, reach_RLR = (
                each[drawn_RM].sum(1) * scale_R11 for each in (rows_QLR, parts_QLP, pairs_QLR, work_QLR, reach_QLR)
            )
            levels.append([_hops(rows_RLR[:, layer], parts_RLP[:, layer], wire) for layer in range(rows_RLR.shape[1])])
            own_LR = np.einsum("rlr->lr", pairs_RLR)
            sums = [reach_RLR.sum(0), pairs_RLR.sum(0), own_LR, work_RLR.sum(0)]
            for kept, each in zip(found, sums, strict=True):
                kept.append(each)
        arrays = [np.stack(each) for each in found]
        hops_HFSLR = np.array(levels).transpose(2, 3, 0, 1, 4)
        spread = np.stack([arrays[0].mean(1).std(0, ddof=1), arrays[1].mean(1).std(0, ddof=1)])
        return Load(tuple(Hop(*hop_FSLR) for hop_FSLR in hops_HFSLR), *arrays, spread=spread, mark=self.mark)
