"""Dispatch plans that counting kernels make in Triton's interpreter equal torch's plans in every tensor.

The ranks run one after the other. With the kernels, each rank must send the items that it sends in the reference. It
then receives the items that it receives in the reference.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import CountingPlanner
from moe_dist.moe.dispatch.planning import DispatchPlanner
from moe_dist.moe.kernels import plan as kernels
from moe_dist.moe.kernels.interface import RowIndex
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.cover import full_unless

EXPERTS, CHOICES = 7, 3
GROUPS = (ExpertGroup("all", EXPERTS, 2, CHOICES, 8, 0, ("text",)),)
PLACEMENTS = {
    "one rank": ((0, 1, 2, 3, 4, 5, 6),),
    "uneven": ((5,), (0, 2, 4, 6), (1, 3)),
    "a rank without experts": ((3, 4, 5, 6), (), (0, 1, 2)),
}
BATCHES = ("mixed", "all null", "one expert takes all", "a rank without tokens", "no tokens")


class NotYetKnownError(Exception):
    """Raised when a rank needs items from ranks that have not reached the exchange yet."""


class Wire(AllToAll):
    """One rank of a simulated all-to-all. The first call of an exchange records the sent items in `sent`; later calls must
    send the same items. A call receives the items of `arrived`."""

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


def plan_of(planner: Any, pairs: Assignments) -> Any:
    num_tokens = len(pairs.token_N) // CHOICES
    (plan,), own = planner.plan(pairs, num_tokens, "layer")
    assert own.slot_counts == ()
    return plan


def reference(make: Callable[[Wire], Any], pairs: list[Assignments]) -> tuple[list[Any], list[Any]]:
    """Returns the plans of all ranks, and the items that each rank sends and receives. Each round makes all plans
    again, and reaches one more exchange than the previous round."""
    size = len(pairs)
    exchanges: list[tuple[list[tuple[Tensor, Splits]], list[Tensor]]] = [([], []) for _ in range(size)]
    while True:
        try:
            wires = [Wire(rank, size, *each) for rank, each in enumerate(exchanges)]
            return [plan_of(make(wire), each) for wire, each in zip(wires, pairs, strict=True)], exchanges
        except NotYetKnownError:
            for rank, each in enumerate(pairs[1:], 1):
                with suppress(NotYetKnownError):
                    plan_of(make(Wire(rank, size, *exchanges[rank])), each)
            pieces = [items.split(list(splits.send)) for items, splits in (sent[-1] for sent, _ in exchanges)]
            for rank, (_, arrived) in enumerate(exchanges):
                arrived.append(torch.cat([each[rank] for each in pieces]))


def counted(make: Callable[[Wire], Any], pairs: Assignments, rank: int, exchanges: list[Any]) -> Any:
    wire = Wire(rank, len(exchanges), *exchanges[rank])
    plan = plan_of(make(wire), pairs)
    assert wire.calls == len(wire.arrived)
    return plan


def check_equal(plan: Any, expected: Any, *fields: str) -> None:
    for field in fields:
        ours, theirs = getattr(plan, field), getattr(expected, field)
        assert torch.equal(ours, theirs), field
        assert ours.dtype == theirs.dtype, field


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills uninitialised integer memory with the largest number
    monkeypatch.setattr(kernels, "ELEMENTS", 128)  # 16 tokens per block
    monkeypatch.setattr(kernels, "BLOCK", 4)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("name", "batch"),
    full_unless(
        lambda name, batch: batch == "mixed" or (name, batch) == ("uneven", "a rank without tokens"),
        product(PLACEMENTS, BATCHES),
    ),
)
@pytest.mark.slow
def test_counting_plans_as_torch(name: str, batch: str) -> None:
    placement = ExpertPlacement(GROUPS, PLACEMENTS[name])
    pairs = [drawn(batch, rank, placement.num_ranks) for rank in range(placement.num_ranks)]
    plans, exchanges = reference(partial(DispatchPlanner, placement), pairs)
    for rank, expected in enumerate(plans):
        plan = counted(partial(CountingPlanner, placement), pairs[rank], rank, exchanges)
        assert (plan.rows, plan.pairs, plan.slot_counts) == (expected.rows, expected.pairs, expected.slot_counts)
        check_equal(plan, expected, "pair_P", "row_S", "row_O", "order_Q", "row_of_pair_Q")
        num_rows = plan.num_own_rows + sum(plan.rows.receive)
        for items, index in (
            (plan.table_index.items_of_rows, expected.table_index),
            (plan.row_items, RowIndex((expected.row_of_pair_Q,), num_rows)),
        ):
            order, first = index.items_of_rows
            assert index.num_rows == 0 or torch.equal(items[1], first)
            assert torch.equal(items[0].to(order.dtype), order)


def test_pairs_in_another_order_are_planned_by_torch() -> None:
    """With expert choice a token has no fixed number of choices, and pairs need not be sorted by token."""
    placement = ExpertPlacement(GROUPS, PLACEMENTS["one rank"])
    pairs = Assignments(torch.tensor([2, 0, 1]), torch.tensor([1, 1, 0]), torch.ones(3))
    (plan,), _ = CountingPlanner(placement, AllToAll(None, CommStats())).plan(pairs, 3, "layer")
    assert plan.row_items is None
    assert plan.row_of_pair_Q.tolist() == [1, 2, 0]
