"""Defines the base class of levers that decide by the experts' loads in a window of steps.

Shape letters: S steps, L MoE layers, E true experts.
"""

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
from pydantic import JsonValue

from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertPlacement
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
