"""The exchange that DeepEP (expanded layout) and HybridEP (with permutation) have in common, in torch over gloo.

A token sends one row to each rank that has experts of its choice. Rows arrive by source rank, then by token. Each row
is copied for each of its pairs, and the copies are sorted by slot. Combine sums and rounds first the pairs of a row,
then the rows of a token. Shapes: T tokens, W ranks, E slots of a rank, X = W E, R arrived rows, Q pairs.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SortedPairs:
    """One routing: the pairs of each token and slot.

    Args:
        chosen_TX: bool, contiguous.
        last_first: Reverses the rows of each slot, an order that no library promises.
    """

    def __init__(self, group: dist.ProcessGroup, chosen_TX: Tensor, *, last_first: bool = False) -> None:
        self.group, self.rank, size = group, dist.get_rank(group), dist.get_world_size(group)
        self.tokens, self.slots = chosen_TX.shape[0], chosen_TX.shape[1] // size
        self.in_rank_TW = chosen_TX.view(self.tokens, size, self.slots).any(2)
        self.sent: list[int] = self.in_rank_TW.sum(0).tolist()
        incoming = torch.empty(size, dtype=torch.int64)
        dist.all_to_all_single(incoming, self.in_rank_TW.sum(0), group=group)
        self.received: list[int] = incoming.tolist()
        here_RE = self.rows(chosen_TX.to(torch.uint8))[:, self.own].bool()
        rows_of = [column.nonzero()[:, 0] for column in here_RE.unbind(1)]
        self.row_Q = torch.cat([rows.flip(0) if last_first else rows for rows in rows_of])
        self.slot_Q = torch.arange(self.slots).repeat_interleave(here_RE.sum(0))
        self.counts: list[int] = here_RE.sum(0).tolist()

    @property
    def own(self) -> slice:
        return slice(self.rank * self.slots, (self.rank + 1) * self.slots)

    @property
    def num_rows(self) -> int:
        return sum(self.received)

    def rows(self, table: Tensor) -> Tensor:
        rows = table.new_empty(self.num_rows, *table.shape[1:])
        dist.all_to_all_single(rows, table[self._tokens], self.received, self.sent, group=self.group)
        return rows

    def dispatch(self, table_TD: Tensor) -> Tensor:
        return self.rows(table_TD)[self.row_Q]

    def combine(self, rows_QD: Tensor) -> Tensor:
        rows_RD = self._sum(rows_QD, self.row_Q, self.num_rows)
        back = rows_RD.new_empty(sum(self.sent), rows_RD.shape[1])
        dist.all_to_all_single(back, rows_RD, self.sent, self.received, group=self.group)
        return self._sum(back, self._tokens, self.tokens)

    def weights(self, table_TX: Tensor) -> Tensor:
        return self.rows(table_TX)[self.row_Q, self.own.start + self.slot_Q]

    def weights_back(self, weight_Q: Tensor) -> Tensor:
        table_RX = torch.zeros(self.num_rows, self.slots * len(self.sent))
        table_RX[self.row_Q, self.own.start + self.slot_Q] = weight_Q
        back = table_RX.new_empty(sum(self.sent), table_RX.shape[1])
        dist.all_to_all_single(back, table_RX, self.sent, self.received, group=self.group)
        return self._sum(back, self._tokens, self.tokens)

    @property
    def _tokens(self) -> Tensor:
        """Returns the token of each sent row, in the order of destination ranks."""
        return torch.cat([column.nonzero()[:, 0] for column in self.in_rank_TW.unbind(1)])

    @staticmethod
    def _sum(rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
        wide: Any = torch.promote_types(rows.dtype, torch.float32)
        return torch.zeros(num_rows, rows.shape[1], dtype=wide).index_add_(0, index, rows.to(wide)).to(rows.dtype)
