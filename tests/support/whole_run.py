"""Runs a whole run on the ranks of a test, from its configuration to its last evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dist.config.schema import Config
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.parallel.initialise import logical_expert_names
from moe_dist.placement.parameter_names import logical_name, named_parameters
from moe_dist.train.build.training import Training
from moe_dist.train.loop.trainer import Progress
from moe_dist.train.rank_balance.levers import LeverParts, build_levers
from moe_dist.train.step.result import StepResult
from tests.support.engine_run import Run, built_run
from tests.support.tiny import tiny_config
from tests.support.worlds import RankContext


@dataclass(frozen=True)
class WholeRun:
    """The results of a run on one rank.

    Attributes:
        begun, ended: Progress at the start of this attempt, and at the end.
        tensors: Parameters and persistent buffers by logical name, with this rank's experts.
        at_start: The values of these tensors after the weights were loaded and before the first step.
        trained: Names of the parameters with moments in the optimizer.
        steps: Every step's result.
    """

    begun: Progress
    ended: Progress
    tensors: dict[str, np.ndarray]
    at_start: dict[str, np.ndarray]
    trained: set[str]
    evaluation: EvaluationResult
    steps: list[StepResult]


def whole_run(rank: RankContext, data: Path, root: Path, changes: Mapping[str, Any]) -> WholeRun:
    """Starts or resumes the run."""
    config = tiny_config(data, root, {"evaluation.balance_efficiency": False, **changes})
    with built_run(config, world_size=rank.world_size) as run:
        return _run_to_end(run)


def _run_to_end(run: Run) -> WholeRun:
    training, config = run.training, run.config
    levers = build_levers(LeverParts(config, run.placement, training, run.loader))
    saver = run.saver(levers=levers)
    trainer = run.trainer(saver, levers=levers)
    begun = replace(trainer.progress)
    at_start = tensors_of(config, training, saver.placement, run.mesh.ep_rank)
    steps: list[StepResult] = []
    trainer.take_step = _Recorded(training.step, steps)  # pyright: ignore[reportAttributeAccessIssue]
    finished = trainer.fit()
    saver.writer.wait()
    own = isinstance(training.parallel.model, torch.nn.Module)
    named = {parameter: name for _, name, _, parameter in named_parameters(training.parallel.model)} if own else {}
    return WholeRun(
        begun=begun,
        ended=trainer.progress,
        tensors=tensors_of(config, training, trainer.plan.placement, run.mesh.ep_rank),
        at_start=at_start,
        trained={named[parameter] for parameter in training.optimizer.state} if own else set(),
        evaluation=finished.evaluation,
        steps=steps,
    )


class _Recorded:
    def __init__(self, step: Any, results: list[StepResult]) -> None:
        self._step, self._results = step, results

    def __call__(self, *args: Any, **options: Any) -> StepResult:
        self._results.append(self._step(*args, **options))
        return self._results[-1]


def tensors_of(config: Config, training: Training, placement: Any, ep_rank: int) -> dict[str, np.ndarray]:
    """Returns full tensors by logical name. Collective under FSDP2. Empty for Megatron, which has parts of tensors."""
    found: dict[str, np.ndarray] = {}
    if not isinstance(training.parallel.model, torch.nn.Module):
        return found
    for path, tensor in training.parallel.model.state_dict().items():
        name = logical_name(path)
        whole = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()
        if ".moe.experts." in name:
            found.update(zip(logical_expert_names(name, placement, ep_rank), whole, strict=True))
        else:
            found[name] = whole
    return found
