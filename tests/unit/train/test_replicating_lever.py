"""Decisions to replicate experts: an expert hotter than a rank's even share, costs, noise, a moving hot spot, the saved
state."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import DataError
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica
from moe_dist.train.rank_balance.moving_lever import MovingLever
from moe_dist.train.rank_balance.replicating_lever import ReplicatingLever

EVERY = 16
ONE = (ExpertGroup("all", 32, 0, 2, 8),)
START = ExpertPlacement.interleaved(ONE, 4)


class Played:
    """A lever on made-up counts of two layers, and its changes."""

    def __init__(self, placement: ExpertPlacement = START, layers: int = 2, **changes: Any) -> None:
        self.changes: list[PlacementWithReplicas] = []
        fields = {"edp": 1, "bytes_per_value": 4.0, "every": EVERY, "slots": 1, "flops_per_byte": 15.0} | changes
        self.lever = ReplicatingLever(placement, self.changes.append, layers=layers, **fields)
        self.step, self.shown = 0, list[LeverDecision]()

    def play(self, pairs_LE: np.ndarray) -> float:
        """Takes a step. Returns its balance efficiency by count."""
        self.step += 1
        rows_LR = self.lever.placement.by_rank(pairs_LE)
        decision = self.lever.after_step(result_of(pairs_LE), step=self.step, position=0)
        self.shown += [] if decision is None else [decision]
        return float(rows_LR.mean(1).sum() / rows_LR.max(1).sum())


def result_of(pairs_LE: np.ndarray) -> Any:
    return SimpleNamespace(counts=SimpleNamespace(choices_LC=pairs_LE, dropped_LE=np.zeros_like(pairs_LE)))


def hot(step: int, *, expert: int = 5, share: float = 0.5) -> np.ndarray:
    """Returns counts of two layers. In the second, one expert takes a share of 8,192 pairs, by default twice a rank's even
    share."""
    rng = np.random.default_rng(step)
    even, one = np.full(32, 1 / 32), np.eye(32)[expert]
    return np.stack([rng.multinomial(8192, even), rng.multinomial(8192, share * one + (1 - share) * even)])


def test_an_expert_hotter_than_a_rank_is_shared() -> None:
    """Moving does not help, because the hot expert overloads any rank. Replicas in its layer do."""
    moving = MovingLever(START, lambda *_: None, edp=1, layers=2, every=EVERY, payback_steps=10_000, flops_per_byte=0.0)
    moved = [moving.after_step(result_of(hot(step)), step=step + 1, position=0) for step in range(3 * EVERY)]
    played = Played()
    before = [played.play(hot(step)) for step in range(EVERY)]
    after = [played.play(hot(step)) for step in range(EVERY, 3 * EVERY)]
    assert moved == [None] * len(moved), "a hot expert alone is twice a rank's even share"
    assert np.mean(before) < 0.6
    assert np.mean(after) >= 0.95
    (change,) = played.changes
    assert change.replicas[0] == ()
    assert {expert for expert, _ in change.replicas[1]} == {5}
    assert 1 / played.shown[0].after == pytest.approx(np.mean(after), abs=0.02), "as predicted"
    line = json.loads(json.dumps(played.shown[0].line))
    assert line["replicas"] == [[], [[*each] for each in change.replicas[1]]]


def test_replicas_that_cost_more_than_they_save_are_refused() -> None:
    """By hand: experts with loads 6 and 0 on two ranks, so a replica takes 3 of 6 pairs from its rank. One rank sends an
    expert, the other receives it. At 12 bytes per value and 0.5 FLOPs per byte this costs one of the six rows that the
    busiest rank computes in a step. At 2 FLOPs per byte it costs four rows, more than the three that it saves."""
    start, pairs = ExpertPlacement((ExpertGroup("all", 2, 0, 1, 8),), ((0,), (1,))), np.array([[6, 0]])
    cheap, dear = (Played(start, 1, bytes_per_value=12.0, flops_per_byte=flops) for flops in (0.5, 2.0))
    halved = Played(start, 1, bytes_per_value=12.0, flops_per_byte=1.0, edp=2)  # each EP group has half of the pairs
    for _ in range(EVERY):
        for each in (cheap, dear, halved):
            each.play(pairs)
    (yes,), (no,) = cheap.shown, dear.shown
    assert cheap.changes == [PlacementWithReplicas(start.groups, start.slots, ((Replica(0, 1),),))]
    assert (yes.before, yes.after) == (2.0, 1.0)
    assert yes.cost_steps == pytest.approx(EVERY / 6)
    assert "save 8 of 16 steps and cost 2.67, a sum of +5.33" in yes.text
    assert (no.taken, no.placement, dear.changes) == (False, None, [])
    assert "save 8 of 16 steps and cost 10.7, a sum of -2.67" in no.text
    assert (halved.changes, halved.shown[0].taken) == ([], False)


def test_replicas_follow_a_hot_spot_and_go_when_it_cools() -> None:
    played = Played()
    for step in range(EVERY):
        played.play(hot(step))
    for step in range(EVERY, 3 * EVERY):
        played.play(hot(step, expert=14))
    followed = [played.play(hot(step, expert=14)) for step in range(3 * EVERY, 4 * EVERY)]
    for step in range(4 * EVERY, 6 * EVERY):
        played.play(hot(step, share=0.0))
    experts = [{expert for expert, _ in change.replicas[1]} for change in played.changes]
    assert experts == [{5}, {14}, set()]
    assert min(followed) >= 0.95


def test_replicas_go_at_once_if_the_last_steps_need_none() -> None:
    """The first half of the second window still proposes replicas. In the second half they only cost."""
    played = Played(flops_per_byte=600.0)
    for step in range(2 * EVERY):
        played.play(hot(step, share=0.5 if step < EVERY * 3 // 2 else 0.0))
    assert [any(change.replicas) for change in played.changes] == [True, False]


def test_it_does_not_thrash_on_a_noisy_even_load() -> None:
    played, rng = Played(flops_per_byte=0.0), np.random.default_rng(0)
    for _ in range(30 * EVERY):
        played.play(rng.multinomial(400, np.full(32, 1 / 32), size=2))
    assert len(played.changes) <= 1


def test_a_rank_has_at_most_its_slots() -> None:
    pairs = np.stack([np.r_[4000, 4000, 4000, np.full(29, 10)]])
    for slots in (1, 2):
        played = Played(ExpertPlacement(ONE, tuple(tuple(range(8 * r, 8 * r + 8)) for r in range(4))), 1, slots=slots)
        for _ in range(EVERY):
            played.play(pairs)
        ranks = [rank for _, rank in played.lever.placement.replicas[0]]
        assert max(map(ranks.count, ranks)) == slots


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: None,
        lambda state: {**state, "replicas": [[[5, 0]], []]},  # expert 5 is on rank 0 itself
        lambda state: {**state, "replicas": [[]]},
        lambda state: {**state, "pairs": [[1, 2, 3]]},
        lambda state: {**state, "pairs": [each * 2 for each in state["pairs"]]},
        lambda state: {**state, "pairs": [[[-1 for _ in row] for row in each] for each in state["pairs"]]},
        lambda state: {**state, "pairs": [[[10**30 for _ in row] for row in each] for each in state["pairs"]]},
        lambda state: {"slots": state["slots"], "replicas": state["replicas"]},
    ],
    ids=["nothing", "own rank", "one layer", "other experts", "other layers", "negative", "huge", "no pairs"],
)
def test_a_state_of_another_model_is_refused(damage: Callable[[Any], Any]) -> None:
    played = Played()
    played.play(hot(0))
    with pytest.raises(DataError, match="lever of replicas"):
        played.lever.restore(damage(played.lever.state()))


def test_on_other_ranks_there_are_no_replicas() -> None:
    played = Played()
    for step in range(EVERY):
        played.play(hot(step))
    other = Played(ExpertPlacement.interleaved(ONE, 8))
    other.lever.restore(played.lever.state())
    assert (other.changes, any(other.lever.placement.replicas)) == ([], False)
