"""Computes the rows and (token, expert) pairs of each rank in a micro-batch, either expected from the configuration or
drawn from a trace. Imports no torch.

A row is a distinct pair of a token and a rank that computes at least one of the token's experts. Shape letters: S draws of
a micro-batch, L MoE layers (1 if all are alike), R ranks of an EP group, Q traced sequences, T traced tokens, E true
experts, K choices, G groups.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_dist.placement.placement import ExpertGroup, ExpertPlacement, group_shares
from moe_dist.plan.rates import Mark

# The number of exchanges of a row in forward and backward: dispatch, combine, the gradients of both, and exchanges that
# recomputation repeats.
EXCHANGES = {"none": 4, "experts": 4, "block": 5}
DRAWS = 16  # number of micro-batches that are drawn from a trace


@dataclass(frozen=True)
class Load:
    """The rows that each rank sends and computes, and the (token, expert) pairs that it computes, for one micro-batch. All
    arrays except `spread` are [S, L, R].

    Attributes:
        inside, between: Number of rows that a rank sends or, if more, receives in one dispatch: inside its node, and
            between nodes. For the dispatcher `hierarchical`: in the hop inside nodes, and in the hop between nodes.
        sent_inside, sent_between: Number of rows that a rank sends inside its node, and to other nodes. Their sums give the
            bytes.
        rows: Number of rows that the rank computes, including rows of its own tokens.
        pairs, own: Number of (token, expert) pairs that the rank computes, for all tokens and for its own tokens.
        work: Sum of the FFN widths over the (token, expert) pairs that the rank computes.
        spread: Standard deviation over micro-batches of a rank's mean number of rows, and of pairs, per layer, [2, R].
    """

    inside: np.ndarray
    between: np.ndarray
    sent_inside: np.ndarray
    sent_between: np.ndarray
    rows: np.ndarray
    pairs: np.ndarray
    own: np.ndarray
    work: np.ndarray
    spread: np.ndarray
    mark: Mark


@dataclass(frozen=True)
class Wire:
    """Determines which rows a dispatcher sends. `node` is the number of ranks in a node. `hops` is 2 if each token is sent
    only once to a node. `each_pair` is True if each (token, expert) pair is sent as a separate row. `first` is the position
    in its node of the EP group's first rank; with two hops it is 0."""

    node: int
    hops: int = 1
    each_pair: bool = False
    first: int = 0

    def nodes(self, ranks: int) -> np.ndarray:
        """Returns the node of each rank of an EP group, counted from the node of its first rank, [R]."""
        return (self.first + np.arange(ranks)) // self.node


def group_starts(ep: int, edp: int, node: int) -> dict[int, int]:
    """Maps each position in a node to the number of EP groups that begin there, for `edp` groups of `ep` consecutive ranks.
    Groups that stay in one node count as position 0, because they all exchange in the same way."""
    firsts = (group * ep % node for group in range(edp))
    return dict(Counter(first if first + ep > node else 0 for first in firsts))


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
        nodes = wire.nodes(ranks)
        node_N = _reached(groups, share_G, np.stack([here_RG[nodes == node].sum(0) for node in range(nodes[-1] + 1)]))
        rows_1R = tokens * row_R[None]
        sent = _by_level(np.repeat(rows_1R, ranks, 0), np.tile(tokens * node_N, (ranks, 1)), wire)
        widths = np.array([group.ffn_dim for group in groups], float)
        chance_R, taken_R = _reached(groups, share_G, here_RG), pair_RG.sum(1)
        several_R = np.array([_pair_variance(groups, share_G, here) for here in here_RG])
        spread = np.sqrt(ranks * tokens * np.stack([chance_R * (1 - chance_R), several_R]) / max(1, layers))
        shape = (1, 1, ranks)
        return Load(
            *(each.reshape(shape) for each in sent),
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


def _by_level(rows_RR: np.ndarray, nodes_RN: np.ndarray, wire: Wire) -> tuple[np.ndarray, ...]:
    """Returns the fields `inside`, `between`, `sent_inside` and `sent_between` of a `Load`, each [R].

    Args:
        rows_RR: Number of rows from each rank (first axis) to each rank (second axis).
        nodes_RN: Number of tokens of each rank that take an expert on each node.
    """
    ranks = len(rows_RR)
    node_R = wire.nodes(ranks)
    same_RR = node_R[:, None] == node_R
    away_RR = np.where(np.eye(ranks, dtype=bool), 0.0, rows_RR)
    near_RR, far_RR = np.where(same_RR, away_RR, 0.0), np.where(same_RR, 0.0, away_RR)
    if wire.hops == 1:
        sent = near_RR.sum(1), far_RR.sum(1)
        return np.maximum(sent[0], near_RR.sum(0)), np.maximum(sent[1], far_RR.sum(0)), *sent
    far_RN = np.where(node_R[:, None] == np.arange(nodes_RN.shape[1]), 0.0, nodes_RN)
    nodes, local = nodes_RN.shape[1], np.arange(ranks) % wire.node
    arrived_R, forward_R, taken_R = np.zeros(ranks), near_RR.sum(1), near_RR.sum(0)
    # A row from another node first goes to the rank with the sender's local index in the receiving node.
    for rank in range(ranks):
        sources = [node * wire.node + local[rank] for node in range(nodes) if node != node_R[rank]]
        arrived_R[rank] = far_RN[sources, node_R[rank]].sum()
        on_R = same_RR[rank] & (np.arange(ranks) != rank)
        onward_R = far_RR[sources].sum(0) * on_R
        forward_R[rank] += onward_R.sum()
        taken_R += onward_R
    sent_far = far_RN.sum(1)
    return np.maximum(forward_R, taken_R), np.maximum(sent_far, arrived_R), forward_R, sent_far


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
        reach_QLR, nodes_QLN = self.rows(rank_E), self.rows(wire.nodes(ranks)[rank_E])
        rows_QLR = pairs_QLR if wire.each_pair else reach_QLR
        rng = np.random.default_rng(self.seed)
        found: list[list[np.ndarray]] = [[] for _ in range(8)]
        sequences = max(1, round(tokens / self.tokens_Q.mean()))  # number of sequences in a rank's micro-batch
        for _ in range(DRAWS):
            drawn_RM = rng.integers(0, len(self.first_Q), (ranks, sequences))
            scale_R11 = (tokens / self.tokens_Q[drawn_RM].sum(1))[:, None, None]
            rows_RLR, nodes_RLN, pairs_RLR, work_RLR, reach_RLR = (
                each[drawn_RM].sum(1) * scale_R11 for each in (rows_QLR, nodes_QLN, pairs_QLR, work_QLR, reach_QLR)
            )
            levels = [_by_level(rows_RLR[:, layer], nodes_RLN[:, layer], wire) for layer in range(rows_RLR.shape[1])]
            own_LR = np.einsum("rlr->lr", pairs_RLR)
            sums = [reach_RLR.sum(0), pairs_RLR.sum(0), own_LR, work_RLR.sum(0)]
            for kept, each in zip(found, [*map(np.stack, zip(*levels, strict=True)), *sums], strict=True):
                kept.append(each)
        arrays = [np.stack(each) for each in found]
        spread = np.stack([arrays[4].mean(1).std(0, ddof=1), arrays[5].mean(1).std(0, ddof=1)])
        return Load(*arrays, spread=spread, mark=self.mark)
