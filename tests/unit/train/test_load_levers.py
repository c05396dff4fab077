"""Tests the decisions to move experts: for several hot experts, for an expert hotter than a rank's even share, under noise,
by costs, and with a saved state."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import DataError
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.rank_balance.moving_lever import MovingLever

EVERY = 16
MANY = (ExpertGroup("all", 64, 0, 4, 8),)
ONE = (ExpertGroup("all", 32, 0, 2, 8),)
CONTIGUOUS = ExpertPlacement(MANY, tuple(tuple(range(16 * rank, 16 * rank + 16)) for rank in range(4)))
START = ExpertPlacement.interleaved(ONE, 4)


class Moving:
    """Gives a lever made-up counts, and keeps its decisions and changes. A change is a pair of placements."""

    def __init__(self, placement: ExpertPlacement, **changes: Any) -> None:
        self.changes: list[Any] = []
        self.step, self.shown = 0, list[LeverDecision]()
        fields = {"edp": 1, "layers": 1, "every": EVERY, "payback_steps": 100, "flops_per_byte": 100.0} | changes
        self.lever = MovingLever(placement, lambda *old_new: self.changes.append(old_new), **fields)

    def play(self, pairs_LE: np.ndarray) -> float:
        """Takes a step. Returns the step's balance efficiency, computed from counts of pairs."""
        self.step += 1
        placement = self.lever.placement
        weighted_LE = pairs_LE * [group.ffn_dim for group in placement.groups for _ in group.experts]
        rows_LR = np.stack([weighted_LE[:, list(slots)].sum(1) for slots in placement.slots], axis=1)
        result: Any = SimpleNamespace(counts=SimpleNamespace(choices_LC=pairs_LE, dropped_LE=np.zeros_like(pairs_LE)))
        decision = self.lever.after_step(result, step=self.step, position=0)
        self.shown += [] if decision is None else [decision]
        return float(rows_LR.mean(1).sum() / rows_LR.max(1).sum())


def drawn(name: str, step: int) -> np.ndarray:
    """Draws the counts of 8,192 pairs. Eight experts are 16 times as likely as the others: of any ranks (W1), of one rank
    (W2), or of the next rank at each step (W6)."""
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


def test_an_expert_hotter_than_a_rank_does_not_move() -> None:
    moving = Moving(START, layers=2, payback_steps=10_000, flops_per_byte=0.0)
    for step in range(3 * EVERY):
        moving.play(hot(step))
    assert moving.shown == [], "a hot expert alone is twice a rank's even share"


def test_a_noisy_even_load_causes_no_thrashing() -> None:
    played, rng, experts = Moving(CONTIGUOUS), np.random.default_rng(0), CONTIGUOUS.num_experts
    for _ in range(30 * EVERY):
        played.play(rng.multinomial(400, np.full(experts, 1 / experts), size=2))
    assert len(played.changes) <= 1


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda state: None,
    "other experts": lambda state: {**state, "pairs": [[1, 2, 3]]},
    "other layers": lambda state: {**state, "pairs": [each * 2 for each in state["pairs"]]},
    "negative": lambda state: {**state, "pairs": [[[-1 for _ in row] for row in each] for each in state["pairs"]]},
    "huge": lambda state: {**state, "pairs": [[[10**30 for _ in row] for row in each] for each in state["pairs"]]},
    "no pairs": lambda state: {name: value for name, value in state.items() if name != "pairs"},
    "one slot": lambda state: {**state, "slots": [[0]]},
    "no slots": lambda state: {**state, "slots": 3},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_of_other_moves_is_refused(damage: str) -> None:
    played = Moving(CONTIGUOUS)
    played.play(drawn("W2", 0))
    with pytest.raises(DataError, match="moves experts"):
        played.lever.restore(DAMAGES[damage](played.lever.state()))


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
