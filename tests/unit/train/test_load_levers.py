"""Tests the decisions to move and to replicate experts. Cases have several hot experts, one expert hotter than a rank's
even share, noise, different costs, and a saved state."""

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
MANY = (ExpertGroup("all", 64, 0, 4, 8),)
ONE = (ExpertGroup("all", 32, 0, 2, 8),)
CONTIGUOUS = ExpertPlacement(MANY, tuple(tuple(range(16 * rank, 16 * rank + 16)) for rank in range(4)))
START = ExpertPlacement.interleaved(ONE, 4)


class Played:
    """Gives a lever made-up counts, and keeps its decisions and changes. A change is a pair of placements, or a placement
    with replicas."""

    lever: Any

    def __init__(self) -> None:
        self.changes: list[Any] = []
        self.step, self.shown = 0, list[LeverDecision]()

    def rows(self, pairs_LE: np.ndarray) -> np.ndarray:
        return self.lever.placement.by_rank(pairs_LE)

    def play(self, pairs_LE: np.ndarray) -> float:
        """Takes a step. Returns the step's balance efficiency, computed from counts of pairs."""
        self.step += 1
        rows_LR = self.rows(pairs_LE)
        result: Any = SimpleNamespace(counts=SimpleNamespace(choices_LC=pairs_LE, dropped_LE=np.zeros_like(pairs_LE)))
        decision = self.lever.after_step(result, step=self.step, position=0)
        self.shown += [] if decision is None else [decision]
        return float(rows_LR.mean(1).sum() / rows_LR.max(1).sum())


class Moving(Played):
    def __init__(self, placement: ExpertPlacement, **changes: Any) -> None:
        super().__init__()
        fields = {"edp": 1, "layers": 1, "every": EVERY, "payback_steps": 100, "flops_per_byte": 100.0} | changes
        self.lever = MovingLever(placement, lambda *old_new: self.changes.append(old_new), **fields)

    def rows(self, pairs_LE: np.ndarray) -> np.ndarray:
        placement = self.lever.placement
        weighted_LE = pairs_LE * [group.ffn_dim for group in placement.groups for _ in group.experts]
        return np.stack([weighted_LE[:, list(slots)].sum(1) for slots in placement.slots], axis=1)


class Replicating(Played):
    def __init__(self, placement: ExpertPlacement = START, layers: int = 2, **changes: Any) -> None:
        super().__init__()
        fields = {"edp": 1, "bytes_per_value": 4.0, "every": EVERY, "slots": 1, "flops_per_byte": 15.0} | changes
        self.lever = ReplicatingLever(placement, self.changes.append, layers=layers, **fields)


def drawn(name: str, step: int) -> np.ndarray:
    """Draws the counts of 8,192 pairs. Eight hot experts are 16 times as likely as other experts. They are on any ranks
    (W1), on one rank (W2), or on another rank in each step (W6)."""
    hot = np.random.default_rng(3).permutation(64)[:8] if name == "W1" else np.arange(8) + 16 * (step % 4) * (name == "W6")
    weight_E = np.where(np.isin(np.arange(64), hot), 16.0, 1.0)
    return np.random.default_rng([3, step]).multinomial(8192, weight_E / weight_E.sum())[None]


@pytest.mark.parametrize("name", ["W1", "W2", "W6"])
def test_hot_experts_are_spread(name: str) -> None:
    """The balance efficiency, computed from counts of pairs, rises from at most 0.6 to at least 0.95. W1 starts with
    its hot experts on one rank."""
    start = CONTIGUOUS
    if name == "W1":
        hot_first = np.argsort(-drawn("W1", 0)[0], kind="stable").reshape(4, -1)
        start = ExpertPlacement(MANY, tuple(tuple(sorted(each)) for each in hot_first.tolist()))
    played = Moving(start)
    before = [played.play(drawn(name, step)) for step in range(EVERY)]
    after = [played.play(drawn(name, step)) for step in range(EVERY, 3 * EVERY)]
    assert np.mean(before) <= 0.6
    assert np.mean(after) >= 0.95
    assert len(played.changes) == 1
    assert 1 / played.shown[0].after == pytest.approx(np.mean(after), abs=0.02), "as predicted"


def test_a_move_that_does_not_pay_back_is_refused() -> None:
    """Two ranks have experts with loads 3 3 and 1 1. One swap saves the busiest rank 2 of its 6 pairs per step. Each rank
    sends and receives one expert, which costs as much as 200 pairs, so the swap pays back after 100 steps."""
    groups, pairs = (ExpertGroup("all", 4, 0, 1, 8),), np.array([[3, 3, 1, 1]])
    start = ExpertPlacement(groups, ((0, 1), (2, 3)))
    refused, done = (Moving(start, payback_steps=steps) for steps in (99, 100))
    for _ in range(EVERY):
        refused.play(pairs)
        done.play(pairs)
    (no,), (yes,) = refused.shown, done.shown
    assert (no.taken, no.placement, refused.changes) == (False, None, [])
    assert "more than payback_steps=99" in no.text
    assert (no.before, no.after, no.cost_steps) == (1.5, 1.0, pytest.approx(200 / 6))
    assert yes.taken
    assert "pay back after 100 steps" in yes.text
    assert done.changes == [(start, yes.placement)]
    assert json.loads(json.dumps(yes.line))["slots"] == [[*each] for each in done.lever.placement.slots]
    half = Moving(start, payback_steps=199, edp=2)  # each EP group has half of the pairs, so a move saves half as much
    for _ in range(EVERY):
        half.play(pairs)
    assert half.changes == []


def hot(step: int, *, expert: int = 5, share: float = 0.5) -> np.ndarray:
    """Returns counts of two layers. In the second layer one expert takes a share of the 8,192 pairs, by default twice a
    rank's even share."""
    rng = np.random.default_rng(step)
    even, one = np.full(32, 1 / 32), np.eye(32)[expert]
    return np.stack([rng.multinomial(8192, even), rng.multinomial(8192, share * one + (1 - share) * even)])


def test_an_expert_hotter_than_a_rank_is_shared() -> None:
    """Moving the hot expert does not help, because it overloads any rank. Replicas in its layer help."""
    moving, played = Moving(START, layers=2, payback_steps=10_000, flops_per_byte=0.0), Replicating()
    for step in range(3 * EVERY):
        moving.play(hot(step))
    before = [played.play(hot(step)) for step in range(EVERY)]
    after = [played.play(hot(step)) for step in range(EVERY, 3 * EVERY)]
    assert moving.shown == [], "a hot expert alone is twice a rank's even share"
    assert np.mean(before) < 0.6
    assert np.mean(after) >= 0.95
    (change,) = played.changes
    assert change.replicas[0] == ()
    assert {expert for expert, _ in change.replicas[1]} == {5}
    assert 1 / played.shown[0].after == pytest.approx(np.mean(after), abs=0.02), "as predicted"
    line = json.loads(json.dumps(played.shown[0].line))
    assert line["replicas"] == [[], [[*each] for each in change.replicas[1]]]


def test_replicas_that_cost_more_than_they_save_are_refused() -> None:
    """Two ranks have one expert each, with loads 6 and 0, so a replica takes 3 of 6 rows from the busiest rank. One rank
    sends the expert to the other. At 12 bytes per value and 0.5 FLOPs per byte this costs as much as one row per step. At 2
    FLOPs per byte it costs four rows, more than the three that it saves."""
    start, pairs = ExpertPlacement((ExpertGroup("all", 2, 0, 1, 8),), ((0,), (1,))), np.array([[6, 0]])
    cheap, dear = (Replicating(start, 1, bytes_per_value=12.0, flops_per_byte=flops) for flops in (0.5, 2.0))
    halved = Replicating(start, 1, bytes_per_value=12.0, flops_per_byte=1.0, edp=2)  # each EP group has half of the pairs
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
    played = Replicating()
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


def test_a_rank_has_at_most_its_slots() -> None:
    pairs = np.stack([np.r_[4000, 4000, 4000, np.full(29, 10)]])
    for slots in (1, 2):
        played = Replicating(ExpertPlacement(ONE, tuple(tuple(range(8 * r, 8 * r + 8)) for r in range(4))), 1, slots=slots)
        for _ in range(EVERY):
            played.play(pairs)
        ranks = [rank for _, rank in played.lever.placement.replicas[0]]
        assert max(map(ranks.count, ranks)) == slots


@pytest.mark.parametrize("played", [Moving(CONTIGUOUS), Replicating(flops_per_byte=0.0)], ids=["moves", "replicas"])
def test_a_noisy_even_load_causes_no_thrashing(played: Played) -> None:
    rng, experts = np.random.default_rng(0), played.lever.placement.num_experts
    for _ in range(30 * EVERY):
        played.play(rng.multinomial(400, np.full(experts, 1 / experts), size=2))
    assert len(played.changes) <= 1


OF_BOTH: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda state: None,
    "other experts": lambda state: {**state, "pairs": [[1, 2, 3]]},
    "other layers": lambda state: {**state, "pairs": [each * 2 for each in state["pairs"]]},
    "negative": lambda state: {**state, "pairs": [[[-1 for _ in row] for row in each] for each in state["pairs"]]},
    "huge": lambda state: {**state, "pairs": [[[10**30 for _ in row] for row in each] for each in state["pairs"]]},
    "no pairs": lambda state: {name: value for name, value in state.items() if name != "pairs"},
}
OF_MOVES: dict[str, Callable[[Any], Any]] = {
    "one slot": lambda state: {**state, "slots": [[0]]},
    "no slots": lambda state: {**state, "slots": 3},
}
OF_REPLICAS: dict[str, Callable[[Any], Any]] = {
    "own rank": lambda state: {**state, "replicas": [[[5, 0]], []]},  # expert 5 itself is on rank 0
    "one layer": lambda state: {**state, "replicas": [[]]},
}


@pytest.mark.parametrize("damage", [*OF_BOTH, *OF_MOVES])
def test_a_state_of_other_moves_is_refused(damage: str) -> None:
    played = Moving(CONTIGUOUS)
    played.play(drawn("W2", 0))
    with pytest.raises(DataError, match="moves experts"):
        played.lever.restore((OF_BOTH | OF_MOVES)[damage](played.lever.state()))


@pytest.mark.parametrize("damage", [*OF_BOTH, *OF_REPLICAS])
def test_a_state_of_other_replicas_is_refused(damage: str) -> None:
    played = Replicating()
    played.play(hot(0))
    with pytest.raises(DataError, match="lever of replicas"):
        played.lever.restore((OF_BOTH | OF_REPLICAS)[damage](played.lever.state()))


def test_on_other_ranks_the_configured_placement_stays() -> None:
    saved = Moving(CONTIGUOUS).lever.state()
    two = ExpertPlacement.interleaved(MANY, 2)
    other = Moving(two)
    other.lever.restore(saved)
    assert (other.lever.placement, other.changes) == (two, [])


def test_another_configured_placement_is_not_undone() -> None:
    played = Moving(CONTIGUOUS)
    saved: Any = played.lever.state()
    saved["slots"] = [[*each] for each in reversed(CONTIGUOUS.slots)]
    same = Moving(CONTIGUOUS)
    same.lever.restore(saved)
    assert len(same.changes) == 1
    saved["configured"] = saved["slots"]
    other = Moving(CONTIGUOUS)
    other.lever.restore(saved)
    assert (other.lever.placement, other.changes) == (CONTIGUOUS, [])


def test_on_other_ranks_there_are_no_replicas() -> None:
    played = Replicating()
    for step in range(EVERY):
        played.play(hot(step))
    other = Replicating(ExpertPlacement.interleaved(ONE, 8))
    other.lever.restore(played.lever.state())
    assert (other.changes, any(other.lever.placement.replicas)) == ([], False)
