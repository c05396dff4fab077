"""Defines levers, which keep the ranks equally busy during a run (section `rank_balance`). All are off by default.

The weights of replicas are sent in each forward pass (`moe/experts/replicas.py`). Shape letter: E true experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.config.schema import Config
from moe_dist.data.loader import TrainLoader
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.replicas import ReplicaWeights
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas
from moe_dist.train.build.dispatch import dispatch_with
from moe_dist.train.build.training import COMPUTE_DTYPES, Training
from moe_dist.train.rank_balance.expert_moves import move_experts
from moe_dist.train.rank_balance.moving_lever import MovingLever
from moe_dist.train.rank_balance.replicating_lever import ReplicatingLever
from moe_dist.train.router_tuning.loader import SampleLoader
from moe_dist.train.step.result import StepResult


class ReplicaPlanner:
    """Replaces a dispatcher's planner, so that this rank's tokens go to the replicas that serve this rank
    (`placement/replica_slots.py`). Each layer's planner treats a replica as a separate expert.

    Args:
        plain: The planner that the dispatcher had before. It plans layers without replicas.
        of_layer: Maps a layer's name to two values: the id of each expert's slot (int64 [E + 1]; the last id is for absent
            pairs), and a planner for these slots, of the same kind as `plain`.
    """

    def __init__(self, plain: Any, of_layer: Mapping[str, tuple[Tensor, Any]]) -> None:
        self._plain, self._of_layer = plain, of_layer

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> Any:
        if layer not in self._of_layer:
            return self._plain.plan(assignments, num_tokens, layer)
        slot_E, planner = self._of_layer[layer]
        # absent pairs have the index -1, which selects the last id
        return planner.plan(assignments._replace(expert_N=slot_E[assignments.expert_N]), num_tokens, layer)

    def chunk_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Does the same as `DispatchPlanner.chunk_lengths`. The lengths are equal in all layers."""
        return self._plain.chunk_lengths(num_tokens)


def give_replicas(parallel: ParallelModel, section: DispatchSection, context: DispatchContext) -> None:
    """Replaces the experts' replicas in all MoE layers by the replicas in `context.placement`. All ranks must call this
    between the same two steps. Dispatchers with the capability `replicas` make all plans with their attribute `planner`."""
    mesh, layers, placement = parallel.mesh, parallel.model.moe_modules(), context.placement
    assert isinstance(placement, PlacementWithReplicas)
    wire = context.all_to_all
    dispatcher: Any = section.build(context)
    of_layer: dict[str, tuple[Tensor, Any]] = {}
    for number, layer in enumerate(layers):
        assert isinstance(layer.experts, Experts), "the configuration refuses replicas of other experts"
        layer.dispatcher = dispatcher
        layer.experts.replicas = ReplicaWeights.of(placement, number, str(layer.name), wire)
        if placement.replicas[number]:
            slot_E = torch.tensor([*placement.id_of_expert(number, wire.rank), ABSENT], device=mesh.device)
            planner = section.build(replace(context, placement=placement.in_layer(number))).planner
            of_layer[str(layer.name)] = slot_E, planner
    dispatcher.planner = ReplicaPlanner(dispatcher.planner, of_layer)


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


def _replicating(parts: LeverParts) -> ReplicatingLever | None:
    section, training, config = parts.config.rank_balance.replicating, parts.training, parts.config
    if section is None or parts.placement.num_ranks == 1:
        return None

    assert training.dispatch is not None, "preflight refuses replicas where an engine cannot have them"
    dispatch, mesh, layers = training.dispatch, training.parallel.mesh, training.parallel.model.moe_modules()

    def replicate(placement: PlacementWithReplicas) -> None:
        give_replicas(training.parallel, config.parallel.dispatch, replace(dispatch, placement=placement))
        training.step.placement = placement

    micro_batches = config.train.global_batch // (config.train.micro_batch * mesh.world_size)
    exchanges = micro_batches * (3 if config.parallel.recompute == "block" else 2)
    size = COMPUTE_DTYPES[config.parallel.precision].itemsize
    fields = {"edp": mesh.edp_size, "bytes_per_value": exchanges * size, **section.model_dump()}
    return ReplicatingLever(parts.placement, replicate, layers=len(layers), **fields)


LEVERS: dict[str, Callable[[LeverParts], Lever | None]] = {
    "dealing": _dealing,
    "moving": _moving,
    "replicating": _replicating,
}


def build_levers(parts: LeverParts) -> dict[str, Lever]:
    """Makes the levers that the configuration switches on. Returns them by name."""
    made = {name: make(parts) for name, make in LEVERS.items()}
    return {name: lever for name, lever in made.items() if lever is not None}
