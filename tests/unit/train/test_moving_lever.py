"""Decisions to move experts: workloads of the benchmarks, a changing mix of modalities, noise, costs, and the saved
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
from moe_dist.train.rank_balance.moving_lever import MovingLever
from tools.gpu_check.token_imbalance import WorkloadShape, workload_step

EVERY = 16
SHAPE = WorkloadShape(num_tokens=2048, num_experts=64, top_k=4, num_shards=4)
ONE = (ExpertGroup("all", 64, 0, 4, 8),)
TWO = (ExpertGroup("text", 16, 0, 1, 8), ExpertGroup("image", 16, 0, 1, 16, first_expert=16))
CONTIGUOUS = ExpertPlacement(ONE, tuple(tuple(SHAPE.shard(rank)) for rank in range(4)))


class Played:
    """A lever on made-up counts, and its moves."""

    def __init__(self, placement: ExpertPlacement, **changes: Any) -> None:
        self.moves: list[tuple[ExpertPlacement, ExpertPlacement]] = []
        fields = {"edp": 1, "layers": 1, "every": EVERY, "payback_steps": 100, "flops_per_byte": 100.0} | changes
        self.lever = MovingLever(placement, lambda old, new: self.moves.append((old, new)), **fields)
        self.step, self.shown = 0, list[LeverDecision]()

    def play(self, pairs_LE: np.ndarray) -> float:
        """Takes a step. Returns its balance efficiency by count."""
        self.step += 1
        placement = self.lever.placement
        weighted_LE = pairs_LE * [group.ffn_dim for group in placement.groups for _ in group.experts]
        rows_LR = np.stack([weighted_LE[:, list(slots)].sum(1) for slots in placement.slots], axis=1)
        counts = SimpleNamespace(choices_LC=pairs_LE, dropped_LE=np.zeros_like(pairs_LE))
        result: Any = SimpleNamespace(counts=counts)
        decision = self.lever.after_step(result, step=self.step, position=0)
        self.shown += [] if decision is None else [decision]
        return float(rows_LR.mean(1).sum() / rows_LR.max(1).sum())


def drawn(name: str, step: int) -> np.ndarray:
    choices = workload_step(name, seed=3, step=step, shape=SHAPE).expert_TK
    return np.bincount(choices.flatten(), minlength=SHAPE.num_experts)[None]


@pytest.mark.parametrize("name", ["W1", "W2", "W6"])
def test_hot_experts_are_spread(name: str) -> None:
    """Balance efficiency by count rises from at most 0.6 to at least 0.95. W1 starts with its hot experts on one rank."""
    start = CONTIGUOUS
    if name == "W1":
        hot_first = np.argsort(-drawn("W1", 0)[0], kind="stable").reshape(4, -1)
        start = ExpertPlacement(ONE, tuple(tuple(sorted(each)) for each in hot_first.tolist()))
    played = Played(start)
    before = [played.play(drawn(name, step)) for step in range(EVERY)]
    after = [played.play(drawn(name, step)) for step in range(EVERY, 3 * EVERY)]
    assert np.mean(before) <= 0.6
    assert np.mean(after) >= 0.95
    assert len(played.moves) == 1
    assert 1 / played.shown[0].after == pytest.approx(np.mean(after), abs=0.02), "as predicted"


def mix(image_share: float, seed: int) -> np.ndarray:
    """Returns counts of two layers in a step of 8,192 tokens. The first four experts of a group are four times as
    likely."""
    rng = np.random.default_rng(seed)
    heat = np.r_[np.full(4, 4.0), np.ones(12)]
    share = np.concatenate([(1 - image_share) * heat, image_share * heat]) / heat.sum()
    return rng.multinomial(8192, share, size=2)


def test_it_follows_a_drifting_mix_within_50_steps() -> None:
    """Hot text experts share one rank, hot image experts another. While all tokens are text, only text experts move."""
    slots = tuple((*range(4 * rank, 4 * rank + 4), *range(28 - 4 * rank, 32 - 4 * rank)) for rank in range(4))
    played = Played(ExpertPlacement(TWO, slots))
    for step in range(40):
        played.play(mix(0.0, step))
    settled = len(played.moves)
    worst = played.play(mix(0.9, 40))
    drifted = [played.play(mix(0.9, step)) for step in range(41, 140)]
    assert worst < 0.7
    assert min(drifted[49:]) >= 0.93
    assert settled + 1 <= len(played.moves) <= settled + 2


def test_it_does_not_thrash_on_a_noisy_even_load() -> None:
    played = Played(CONTIGUOUS)
    rng = np.random.default_rng(0)
    for _ in range(40 * EVERY):
        played.play(rng.multinomial(600, np.full(64, 1 / 64), size=4))
    assert len(played.moves) <= 1


def test_a_move_that_does_not_pay_back_is_refused() -> None:
    """By hand: 4 experts with loads 3 3 1 1 on two ranks. One swap saves 2 of 6 pairs per step. Each rank sends and
    receives one expert, at the cost of 200 pairs: 33 steps of the busiest rank, or 100 steps of the saving."""
    groups, pairs = (ExpertGroup("all", 4, 0, 1, 8),), np.array([[3, 3, 1, 1]])
    start = ExpertPlacement(groups, ((0, 1), (2, 3)))
    refused, done = (Played(start, payback_steps=steps) for steps in (99, 100))
    for _ in range(EVERY):
        refused.play(pairs)
        done.play(pairs)
    (no,), (yes,) = refused.shown, done.shown
    assert (no.taken, no.placement, refused.moves) == (False, None, [])
    assert "more than payback_steps=99" in no.text
    assert (no.before, no.after, no.cost_steps) == (1.5, 1.0, pytest.approx(200 / 6))
    assert yes.taken
    assert "pay back after 100 steps" in yes.text
    assert done.moves == [(start, yes.placement)]
    assert json.loads(json.dumps(yes.line))["slots"] == [[*each] for each in done.lever.placement.slots]
    half = Played(start, payback_steps=199, edp=2)  # each EP group has half of the pairs, so a move saves half as much
    for _ in range(EVERY):
        half.play(pairs)
    assert half.moves == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: None,
        lambda state: {**state, "slots": [[0]]},
        lambda state: {**state, "slots": 3},
        lambda state: {**state, "pairs": [[1, 2, 3]]},
        lambda state: {**state, "pairs": [each * 2 for each in state["pairs"]]},
        lambda state: {**state, "pairs": [[[-1 for _ in row] for row in each] for each in state["pairs"]]},
        lambda state: {**state, "pairs": [[[10**30 for _ in row] for row in each] for each in state["pairs"]]},
        lambda state: {"slots": state["slots"]},
    ],
    ids=["nothing", "one slot", "no slots", "other experts", "other layers", "negative", "huge", "no pairs"],
)
def test_a_state_of_another_model_is_refused(damage: Callable[[Any], Any]) -> None:
    played = Played(CONTIGUOUS)
    played.play(drawn("W2", 0))
    with pytest.raises(DataError, match="moves experts"):
        played.lever.restore(damage(played.lever.state()))


def test_on_other_ranks_the_configured_placement_stays() -> None:
    saved = Played(CONTIGUOUS).lever.state()
    two = ExpertPlacement.interleaved(ONE, 2)
    other = Played(two)
    other.lever.restore(saved)
    assert (other.lever.placement, other.moves) == (two, [])


def test_another_configured_placement_is_not_undone() -> None:
    played = Played(CONTIGUOUS)
    saved: Any = played.lever.state()
    saved["slots"] = [[*each] for each in reversed(CONTIGUOUS.slots)]
    same = Played(CONTIGUOUS)
    same.lever.restore(saved)
    assert len(same.moves) == 1
    saved["configured"] = saved["slots"]
    other = Played(CONTIGUOUS)
    other.lever.restore(saved)
    assert (other.lever.placement, other.moves) == (CONTIGUOUS, [])
