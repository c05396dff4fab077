"""Defines levers, which keep the ranks equally busy during a run (section `rank_balance`). All are off by default."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

from moe_dist.config.schema import Config
from moe_dist.data.loader import TrainLoader
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import dispatch_with
from moe_dist.train.build.training import Training
from moe_dist.train.rank_balance.expert_moves import move_experts
from moe_dist.train.rank_balance.moving_lever import MovingLever
from moe_dist.train.router_tuning.loader import SampleLoader
from moe_dist.train.step.result import StepResult

SHOW_EVERY = 100  # number of steps from one shown decision of the loader to the next


class Lever(Protocol):
    """Moves computation between ranks. This changes the loss only by rounding. All ranks make the same decisions."""

    def after_step(self, result: StepResult, *, step: int, position: int) -> LeverDecision | None:
        """Is called after each step. May issue collectives. Returns a decision that is shown, or None.

        Args:
            step: Number of the step; the first step of a run is 1.
            position: Position of the step's first sequence in the stream.
        """
        ...


class DealingLever:
    """Shows how the loader deals the sequences of a step to the ranks (`moe_dist.data.dealing`). Shows this in the first
    and in every `SHOW_EVERY`-th step. The loader keeps the stream's order if no other deal is more even."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def after_step(self, result: StepResult, *, step: int, position: int) -> LeverDecision | None:
        if step != 1 and step % SHOW_EVERY:
            return None
        deal = self._loader.dealt(position)
        taken = deal.dealt < deal.undealt
        why = "it pays at once, because the batch alone decides" if taken else "no deal is better than the stream's order"
        return LeverDecision("dealing", taken, before=deal.undealt, after=deal.dealt, cost_steps=0.0, why=why)


class LeverParts(NamedTuple):
    """The arguments from which `build_levers` makes levers."""

    config: Config
    placement: ExpertPlacement
    training: Training
    loader: TrainLoader | SampleLoader


def _dealing(parts: LeverParts) -> Lever | None:
    on = parts.config.rank_balance.dealing and isinstance(parts.loader, TrainLoader)
    return DealingLever(parts.loader) if on else None  # pyright: ignore[reportArgumentType]


def _moving(parts: LeverParts) -> MovingLever | None:
    section, training = parts.config.rank_balance.moving, parts.training
    if section is None or parts.placement.num_ranks == 1:
        return None

    assert training.dispatch is not None, "preflight refuses moves where an engine cannot take them"
    dispatch = training.dispatch

    def move(old: ExpertPlacement, new: ExpertPlacement) -> None:
        move_experts(training.parallel, training.optimizer, old, new)
        context = replace(dispatch, placement=new)
        dispatch_with(training.parallel.model, parts.config.parallel.dispatch, context)
        training.step.placement = new

    layers = len(parts.config.model.moe_layers)
    edp = training.parallel.mesh.edp_size
    return MovingLever(parts.placement, move, edp=edp, layers=layers, **section.model_dump())


LEVERS: dict[str, Callable[[LeverParts], Lever | None]] = {
    "dealing": _dealing,
    "moving": _moving,
}


def build_levers(parts: LeverParts) -> dict[str, Lever]:
    """Makes the levers that the configuration switches on. Returns them by name."""
    made = {name: make(parts) for name, make in LEVERS.items()}
    return {name: lever for name, lever in made.items() if lever is not None}
