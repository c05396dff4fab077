"""Decides when experts change ranks. A decision depends only on routing counts. It is therefore equal on all ranks, and in
all runs with the same seed.

A window of steps is cut in two halves. The placement solver finds swaps of experts from the loads of the first half; the
loads of the second half decide whether the swaps help. A placement that only fits the noise of the first half shows no gain
there. The solver minimises the busiest rank's load, summed over steps and layers. It therefore also spreads experts that
are busy at different times.

Shape letters: S steps, L MoE layers, E true experts, R ranks of an EP group.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import JsonValue

from moe_dist.errors import ConfigError, DataError
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.solver import improve, pace, rank_loads, slots_of
from moe_dist.train.rank_balance.expert_moves import same_shapes
from moe_dist.train.step.result import StepResult

P = TypeVar("P", bound=ExpertPlacement)


class LoadLever(ABC, Generic[P]):
    """A `moe_dist.train.rank_balance.levers.Lever` that decides once per window of `every` steps, after its last step."""

    def __init__(self, placement: P, every: int, layers: int) -> None:
        self.placement, self._every, self._layers = placement, every, layers
        self._width_E = np.array(placement.width_of_expert)
        self._pairs_SLE: list[np.ndarray] = []  # (token, expert) pairs that were computed since the last decision

    def after_step(self, result: StepResult, *, step: int, position: int) -> LeverDecision | None:
        """See `Lever`. Makes a decision in every `every`-th step. Returns None if the loads require no change."""
        counts = result.counts
        self._pairs_SLE.append(counts.choices_LC[:, : len(self._width_E)] - counts.dropped_LE)
        if step % self._every:
            return None
        pairs_SLE, self._pairs_SLE = np.array(self._pairs_SLE), []
        decision = self._decide(pairs_SLE * self._width_E) if len(pairs_SLE) > 1 else None
        if decision is not None and decision.placement is not None:
            self._place(decision.placement)  # pyright: ignore[reportArgumentType]  # made by `_decide`
        return decision

    @abstractmethod
    def _decide(self, load_SLE: np.ndarray) -> LeverDecision | None:
        """Decides by the experts' loads in at least two steps. A load is (number of (token, expert) pairs) x FFN width."""

    @abstractmethod
    def _place(self, placement: P) -> None:
        """Moves or replicates experts to reach `placement`."""

    def _stored_pairs(self) -> JsonValue:
        return np.array(self._pairs_SLE, np.int64).tolist()

    def _read_pairs(self, stored: Any) -> list[np.ndarray]:
        pairs_SLE = [np.array(each, np.int64) for each in stored]
        shape = (self._layers, len(self._width_E))
        if wrong := [each.shape for each in pairs_SLE if each.shape != shape or (each < 0).any()]:
            raise ValueError(f"pairs of shape {wrong[0]} are no counts of {shape[0]} layers and {shape[1]} experts")
        return pairs_SLE


LEAST_GAIN = 0.02  # a gain below this fraction of the busiest rank's load is taken for noise
# A move of an expert with n parameters sends at most 12 n bytes: weight and two moments in fp32. Muon's single
# moment needs fewer bytes. Forward and backward of one token by this expert take 6 n FLOPs.
BYTES_OVER_FLOPS = 12 / 6


class MovingLever(LoadLever[ExpertPlacement]):
    """A `moe_dist.train.rank_balance.levers.Lever` that moves experts. Checkpoints save the lever's state.

    Args:
        move: Moves experts from the first placement to the second. Collective.
        edp: Number of EP groups. They share the tokens of a step.
        every, payback_steps, flops_per_byte: See `config.rank_balance_schema.MovingSection`.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        move: Callable[[ExpertPlacement, ExpertPlacement], None],
        *,
        edp: int,
        layers: int,
        every: int,
        payback_steps: int,
        flops_per_byte: float,
    ) -> None:
        super().__init__(placement, every, layers)
        self._move, self._edp, self._configured = move, edp, placement.slots
        self._payback_steps, self._flops_per_byte = payback_steps, flops_per_byte
        self._group_E = np.array([number for number, group in enumerate(placement.groups) for _ in group.experts])

    def _decide(self, load_SLE: np.ndarray) -> LeverDecision | None:
        ranks, rank_E = self.placement.num_ranks, np.array(self.placement.rank_of_expert)
        half = len(load_SLE) // 2
        first, second = (each.reshape(-1, load_SLE.shape[2]) for each in np.split(load_SLE, [half]))
        new_E = improve(first, rank_E, self._group_E, ranks)
        if pace(first, new_E, ranks) > (1 - LEAST_GAIN) * pace(first, rank_E, ranks):
            return None
        mean = max(1.0, rank_loads(second, rank_E, ranks).mean(1).sum())
        before, after = (max(1.0, pace(second, each, ranks)) for each in (rank_E, new_E))
        gain, step = 1 - after / before, before / self._edp / (len(load_SLE) - half)  # load of one EP group's busiest rank
        cost, moved = self._cost(rank_E, new_E, load_SLE.shape[1]) / step, int((rank_E != new_E).sum())
        payback = cost / gain if gain > 0 else np.inf
        taken = gain >= LEAST_GAIN and payback <= self._payback_steps
        if gain < LEAST_GAIN:
            why = f"{moved} moves fit one half of {len(load_SLE)} steps, but not the other"
        else:
            limit = "" if taken else f", more than payback_steps={self._payback_steps}"
            why = f"{moved} moves pay back after {payback:.3g} steps{limit}"
        placement = ExpertPlacement(self.placement.groups, slots_of(new_E, ranks)) if taken else None
        return LeverDecision("moving", taken, before / mean, after / mean, cost_steps=cost, why=why, placement=placement)

    def _cost(self, rank_E: np.ndarray, new_E: np.ndarray, layers: int) -> float:
        """Returns the cost of a move, as the work (pairs x FFN width) that its busiest rank could do during the move."""
        moved_E = rank_E != new_E
        sent, received = (np.bincount(each[moved_E], self._width_E[moved_E]) for each in (rank_E, new_E))
        most = max(sent.max(initial=0.0), received.max(initial=0.0))
        return float(most * layers * BYTES_OVER_FLOPS * self._flops_per_byte)

    def _place(self, placement: ExpertPlacement) -> None:
        self._move(self.placement, placement)
        self.placement = placement

    def state(self) -> JsonValue:
        """Returns the current placement, the configured placement, and the routing counts since the last decision."""
        slots: list[JsonValue] = [[*each] for each in self.placement.slots]
        configured: list[JsonValue] = [[*each] for each in self._configured]
        return {"slots": slots, "configured": configured, "pairs": self._stored_pairs()}

    def restore(self, state: JsonValue) -> None:
        """Moves the experts to the saved placement. Collective. The experts stay in the configured placement in two cases:
        the saved placement has other numbers of experts on the ranks, or the configured placement has changed since the
        save. Raises DataError if the argument is no result of the method `state`."""
        try:
            assert isinstance(state, dict)
            slots = tuple(tuple(map(int, each)) for each in state["slots"])  # pyright: ignore
            pairs_SLE = self._read_pairs(state["pairs"])
            placement = ExpertPlacement(self.placement.groups, slots)
        except (ArithmeticError, AssertionError, ConfigError, LookupError, TypeError, ValueError) as error:
            raise DataError(f"state of the lever that moves experts: {state!r:.80} is none ({error!s:.80})") from error
        configured = [[*each] for each in self._configured]
        if same_shapes(self.placement, placement) and state.get("configured", configured) == configured:
            self._place(placement)
        self._pairs_SLE = pairs_SLE
