"""Builds runs on the ranks of tests up to the first step, and defines one small run for both engines."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.config.schema import Config
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.preflight import Preflight, check
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopRequest
from moe_dist.train.build.training import EngineContext, LoopSettings, Training, build_loader, loop_settings
from moe_dist.train.evaluation.evaluator import Evaluator
from moe_dist.train.loop.trainer import Trainer
from moe_dist.train.start.resume import Resumable
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.tracing import StepWatcher
from tests.support.tiny import tiny_config
from tests.support.worlds import RankContext

STEPS = 10
CHANGES: Mapping[str, Any] = {
    "train.steps": STEPS,
    "train.global_batch": 8,
    "train.micro_batch": 2,
    "model.num_layers": 4,
    "model.moe.every": 2,
    "model.moe.first": 1,
    "model.dense_ffn_dim": 24,
    "model.moe.shared_ffn_dim": 8,
    "model.moe.shared_gate": True,
    "model.init_std": 0.1,
    "loss.z": 1e-3,
    "loss.balance.scope": "micro_batch",  # the only scope in Megatron
    "optimizer.eps": 1e-5,  # so large that rounding of a gradient near zero makes no full Adam step
    "placement": {"policy": "interleaved"},
    "evaluation.balance_efficiency": False,
    "evaluation.ablate_experts": False,
}


def config_of(data: str | Path, root: str | Path, changes: Mapping[str, Any]) -> Config:
    """Returns the run's configuration with `changes`, whose keys are dotted names of fields."""
    return tiny_config(Path(data), Path(root), {**CHANGES, **changes})


def ranks(ep: int, edp: int = 1) -> dict[str, Any]:
    """Returns the changes that set the number of ranks."""
    return {"parallel.ep": ep, "parallel.edp": edp}


def megatron(**engine: Any) -> dict[str, Any]:
    """Returns the changes that select Megatron-Core on a CPU."""
    return {"engine": {"kind": "megatron", "cpu_trial": True, **engine}, "loss.balance.scope": "micro_batch"}


@dataclass(frozen=True)
class Run:
    """One rank of a built run before its first step, without a run folder, lease or sinks."""

    config: Config
    checked: Preflight
    mesh: Mesh
    training: Training
    loader: Any

    @property
    def placement(self) -> ExpertPlacement:
        return self.checked.placement

    @property
    def plan(self) -> LoopSettings:
        return loop_settings(self.config, self.checked.manifest, self.placement)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        model: Any = self.training.parallel.model
        for chunk in model.gpt.chunks if hasattr(model, "gpt") else [model]:
            yield from chunk.parameters()

    def saver(self, **options: Any) -> Resumable:
        """Returns the object that saves and restores the run. `options` are further arguments of `Resumable`."""
        manager = CheckpointManager(
            RunFolder.of(self.config).checkpoints,
            keep=self.config.checkpoint.keep,
            lease_check=lambda: None,
            process_group=self.mesh.checkpoint,
        )
        return Resumable(self.training, self.placement, manager, self.config, self.checked.manifest, **options)

    def trainer(self, saver: Resumable, **options: Any) -> Trainer:
        """Restores the run, and returns its trainer. `options` replace arguments of `Trainer`."""
        progress, manifest = saver.restore(), self.checked.manifest
        own = {"sinks": [], "devices": None, "stop": StopRequest(), "progress": progress, **options}
        evaluator = Evaluator(
            self.config, manifest, self.training.parallel, saver.placement, self.training.step.group_of_modality
        )
        plan = loop_settings(self.config, manifest, saver.placement)
        return Trainer(plan, self.training.step, self.loader, evaluator, saver=saver, **own)


@contextmanager
def built_run(config: Config, *, world_size: int = 1) -> Iterator[Run]:
    """Builds a run on all ranks of this world, with the engine of its configuration."""
    checked = check(config, world_size=world_size)
    nodes = config.parallel.dispatch.node_size
    mesh = make_mesh(ep=config.parallel.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=nodes)
    with config.engine.build(EngineContext(config, checked.manifest, checked.placement, mesh)) as training:
        reader, readers = training.parallel.reader
        loader = build_loader(config, checked.manifest, rank=reader, world_size=readers)
        yield Run(config, checked, mesh, training, loader)


@contextmanager
def started_run(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Iterator[Run]:
    """Builds the small run that both engines share, with `changes` of its configuration."""
    torch.set_num_threads(1)
    with built_run(config_of(data, rank.folder, changes), world_size=rank.world_size) as run:
        yield run


def step_results(run: Run, first: int, last: int, watchers: Sequence[StepWatcher] = ()) -> list[StepResult]:
    """Takes the steps from `first` to `last` - 1, and calls the watchers."""
    results = []
    for step in range(first, last):
        batches = run.loader.batches(step * run.config.train.global_batch)
        options: dict[str, Any] = {"lr": run.plan.lr(step), "aux": run.plan.aux(step), "number": step}
        results.append(run.training.step(batches, watchers=watchers, **options))
    return results


def take_steps(run: Run, first: int, last: int, watchers: Sequence[StepWatcher] = ()) -> list[dict[str, Any]]:
    """Takes the steps from `first` to `last` - 1, and calls the watchers. Returns a report of each step."""
    return [
        {
            "loss": float(result.nll_M.sum() / result.labels_M.sum()),
            "norm": result.grad_norm,
            "balance": result.balance,
            "z": result.z,
            "tokens": result.tokens,
            "labels": result.labels_M.tolist(),
            "choices": result.counts.choices_LC,
            "rows": result.ledger,
        }
        for result in step_results(run, first, last, watchers)
    ]


def losses(rank: RankContext, data: str, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a report of each step of a run, which begins with the weights of `run.init_from` if it is set."""
    with started_run(rank, data, changes) as run:
        if run.config.run.init_from is not None:
            run.saver().restore()
        return take_steps(run, 0, run.config.train.steps)
