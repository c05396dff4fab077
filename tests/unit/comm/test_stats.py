"""Tests the bytes that are counted at collectives, and the identity exchange of a single rank."""

import torch

from moe_dist.comm.all_to_all import AllToAll, Splits, split_sizes
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.exchange import Exchange, ExchangePlan


def test_payload_and_metadata_are_apart_and_taken_once() -> None:
    comm_stats = CommStats(events=[])
    comm_stats.count("rows", 100, payload=True)
    comm_stats.count("counts", 8, payload=False)
    comm_stats.count("rows back", 50, payload=True)
    assert comm_stats.take() == (150, 8, 0.0)
    assert comm_stats.take() == (0, 0, 0.0)
    assert comm_stats.events == ["rows", "counts", "rows back"]


def test_the_identity_wire_moves_and_counts_nothing() -> None:
    comm_stats = CommStats(events=[])
    wire = AllToAll(None, comm_stats)
    rows, weights = torch.ones(0, 4, requires_grad=True), torch.ones(0, requires_grad=True)
    none, empty = Splits((0,), (0,)), torch.zeros(0, dtype=torch.int64)
    plan = ExchangePlan("", "", "", 0, none, none, empty, empty, empty, None)
    got, got_weights = Exchange(wire).dispatch(rows, weights, plan)
    assert got.shape == (0, 4)
    (got.sum() + got_weights.sum()).backward()
    assert rows.grad is not None
    assert comm_stats.take() == (0, 0, 0.0)
    assert comm_stats.events == []


def test_own_entries_are_left_out_of_the_splits() -> None:
    assert split_sizes([3, 4, 5], own=1) == (3, 0, 5)
    assert Splits((1, 2), (3, 4)).reversed() == Splits((3, 4), (1, 2))
