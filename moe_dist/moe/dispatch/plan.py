"""What the planner decides and the exchanges of rows follow: records alone. A range of tokens has a plan of its own.

Shape letters: T tokens, P taken pairs, S remote rows sent, O rows of the own rank, Q pairs computed here.
"""

from dataclasses import dataclass

from torch import Tensor

from moe_dist.comm.all_to_all import Splits


@dataclass(frozen=True)
class AllToAllPlan:
    """Who goes where, for one layer and range of tokens; all of it without gradient, and kept under recompute.

    Attributes:
        layer: Name of the layer, for records and reports.
        chunk: Number of the range, as text behind the names of its collectives; empty where there is but one.
        num_tokens: T of the range.
        rows, pairs: Split sizes of remote rows and of remote pairs.
        pair_P: int64, the taken assignments' indices: remote pairs by (rank, slot), then pairs of the own rank by slot.
        token_of_row_S: int64, token of each remote row in sending order, by (rank, token); counted from the range's first.
        token_of_row_O: int64, token of each own-rank row.
        order_Q: int64, permutation that sorts the pairs computed here ([own, received]) by slot.
        row_of_pair_Q: int64, in slot order, the row of each pair in [own rows, received rows].
        slot_counts: Pairs of each of this rank's slots.
    """

    layer: str
    chunk: str
    num_tokens: int
    rows: Splits
    pairs: Splits
    pair_P: Tensor
    token_of_row_S: Tensor
    token_of_row_O: Tensor
    order_Q: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]

    @property
    def num_remote_rows(self) -> int:
        return sum(self.rows.send)

    @property
    def num_pairs(self) -> int:
        return self.pair_P.shape[0]

    @property
    def num_remote_pairs(self) -> int:
        return sum(self.pairs.send)


@dataclass(frozen=True)
class OwnPairs:
    """The pairs of the own rank, where they are computed apart from the others: their rows are the tokens themselves.

    Attributes:
        pair_P: int64, the assignments' indices, by slot.
        row_of_pair_Q: int64, their tokens.
        slot_counts: Pairs of each of this rank's slots.
    """

    pair_P: Tensor
    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]
