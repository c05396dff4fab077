"""Experts in several banks of other owners, such as modules of a transformers model, one bank for each expert group."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout, RunExperts
from moe_dist.moe.routing.draws import recomputed


class ExpertBank(Protocol):
    """The experts of one group on this rank: `num_local` of them, and the function that computes their rows."""

    num_local: int

    def compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor: ...


class _OfBank(NamedTuple):
    """The pairs of one bank (`PairLayout`)."""

    row_of_pair_Q: Tensor
    slot_counts: tuple[int, ...]


class SeveralBanks(nn.Module):
    """This rank's experts of all banks of a layer. A bank may have none on this rank."""

    def __init__(self, banks: Sequence[ExpertBank]) -> None:
        super().__init__()
        self._banks = tuple(banks)

    def start(self, h_TD: Tensor, *, recompute: bool) -> tuple[Tensor, RunExperts]:
        return h_TD, self._again if recompute else self._compute

    def _again(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        return recomputed(self._compute, rows, layout)

    def _compute(self, rows: DispatchedRows, layout: PairLayout) -> Tensor:
        """Returns the sum of all banks, [R, D]. A token has experts of one bank, so the sum rounds nothing."""
        outputs, slot, pair = [], 0, 0
        for bank in self._banks:
            counts = layout.slot_counts[slot : slot + bank.num_local]
            pairs = slice(pair, pair + sum(counts))
            own = DispatchedRows(rows.rows_RD, rows.weight_Q[pairs])
            outputs.append(bank.compute(own, _OfBank(layout.row_of_pair_Q[pairs], counts)))
            slot, pair = slot + bank.num_local, pairs.stop
        return torch.stack(outputs).sum(0)
