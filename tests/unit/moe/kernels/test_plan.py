"""Plans by counting in Triton's interpreter against plans by operations of torch: every tensor is the same.

The ranks come one after the other. Those of the kernels must send what the reference sent, and receive what it received.
"""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.counting_planner import CountingPlanner
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.planning import Planner
from moe_dist.moe.kernels import plan as kernels
from moe_dist.moe.kernels.interface import RowIndex
from moe_dist.moe.routing import ABSENT, Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

EXPERTS, CHOICES = 7, 3
GROUPS = (ExpertGroup("all", EXPERTS, 2, CHOICES, 8, 0, ("text",)),)
PLACEMENTS = {
    "one rank": ((0, 1, 2, 3, 4, 5, 6),),
    "uneven": ((5,), (0, 2, 4, 6), (1, 3)),
    "a rank without experts": ((3, 4, 5, 6), (), (0, 1, 2)),
}
BATCHES = ("mixed", "all null", "one expert takes all", "a rank without tokens", "no tokens")


class NotYetKnownError(Exception):
    """What this rank receives in an exchange depends on ranks that have not come to it yet."""


class Wire(AllToAll):
    """One rank of an all-to-all. It sends what is in `sent`, to which a first time adds, and receives `arrived`."""

    def __init__(self, rank: int, size: int, sent: list[tuple[Tensor, Splits]], arrived: list[Tensor]) -> None:
        super().__init__(None, CommStats())
        self.rank, self.size, self.sent, self.arrived, self.calls = rank, size, sent, arrived, 0
        self.group: Any = None if size == 1 else "ranks of this process"

    def start(self, items: Tensor, splits: Splits, **_: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.calls == len(self.sent):
            self.sent.append((items.clone(), splits))
        before, to = self.sent[self.calls]
        assert torch.equal(items, before)
        assert to == splits
        if self.calls == len(self.arrived):
            raise NotYetKnownError
        received, self.calls = self.arrived[self.calls], self.calls + 1
        return SimpleNamespace(wait=lambda: received)


def drawn(batch: str, rank: int, num_ranks: int) -> Assignments:
    num_tokens = 0 if batch == "no tokens" or (batch == "a rank without tokens" and rank == num_ranks - 1) else 20 + rank
    choices = np.random.default_rng(rank).random((num_tokens, EXPERTS + 2)).argsort(1)[:, :CHOICES]
    expert_TK = torch.from_numpy(np.where(choices < EXPERTS, choices, ABSENT))
    if batch == "all null":
        expert_TK.fill_(ABSENT)
    if batch == "one expert takes all":
        expert_TK[:, 1:], expert_TK[:, 0] = ABSENT, 3
    token_N = torch.arange(num_tokens).repeat_interleave(CHOICES)
    return Assignments(token_N, expert_TK.flatten(), torch.ones(len(token_N)), num_choices=CHOICES)


def reference(placement: ExpertPlacement, pairs: list[Assignments]) -> tuple[list[AllToAllPlan], list[Any]]:
    """The plans of all ranks, and what each sent and received. Each round of plans comes one exchange further."""
    size = placement.num_ranks
    exchanges: list[tuple[list[tuple[Tensor, Splits]], list[Tensor]]] = [([], []) for _ in range(size)]
    while True:
        try:
            plans = [
                Planner(placement, Wire(rank, size, *exchanges[rank])).plan(each, len(each.token_N) // CHOICES, "layer")[0][
                    0
                ]
                for rank, each in enumerate(pairs)
            ]
            return plans, exchanges
        except NotYetKnownError:
            for rank, each in enumerate(pairs[1:], 1):
                with suppress(NotYetKnownError):
                    Planner(placement, Wire(rank, size, *exchanges[rank])).plan(each, len(each.token_N) // CHOICES, "layer")
            pieces = [items.split(list(splits.send)) for items, splits in (sent[-1] for sent, _ in exchanges)]
            for rank, (_, arrived) in enumerate(exchanges):
                arrived.append(torch.cat([each[rank] for each in pieces]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_counting_plans_as_torch(name: str, batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ELEMENTS", 128)  # 16 tokens a block
    monkeypatch.setattr(kernels, "BLOCK", 4)
    placement = ExpertPlacement(GROUPS, PLACEMENTS[name])
    size = placement.num_ranks
    pairs = [drawn(batch, rank, size) for rank in range(size)]
    plans, exchanges = reference(placement, pairs)
    for rank, expected in enumerate(plans):
        wire = Wire(rank, size, *exchanges[rank])
        (plan,), own = CountingPlanner(placement, wire).plan(pairs[rank], len(pairs[rank].token_N) // CHOICES, "layer")
        assert wire.calls == len(wire.arrived)
        assert own.slot_counts == ()
        assert (plan.rows, plan.pairs, plan.slot_counts) == (expected.rows, expected.pairs, expected.slot_counts)
        for field in ("pair_P", "row_S", "row_O", "order_Q", "row_of_pair_Q"):
            ours, theirs = getattr(plan, field), getattr(expected, field)
            assert torch.equal(ours, theirs), field
            assert ours.dtype == theirs.dtype, field
        num_rows = plan.num_own_rows + sum(plan.rows.receive)
        assert plan.row_items is not None
        for items, index in (
            (plan.table_index.items_of_rows, expected.table_index),
            (plan.row_items, RowIndex((expected.row_of_pair_Q,), num_rows)),
        ):
            order, first = index.items_of_rows
            assert index.num_rows == 0 or torch.equal(items[1], first)
            assert torch.equal(items[0].to(order.dtype), order)


def test_pairs_in_another_order_are_planned_by_torch() -> None:
    """Expert choice gives no number of choices, and its runs need not ascend."""
    placement = ExpertPlacement(GROUPS, PLACEMENTS["one rank"])
    pairs = Assignments(torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]), torch.ones(3))
    (plan,), _ = CountingPlanner(placement, AllToAll(None, CommStats())).plan(pairs, 3, "layer")
    assert plan.row_items is None
    assert plan.row_of_pair_Q.tolist() == [1, 2, 0]
