"""The same run with both engines: its configuration, and the losses of its steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_dist.config.schema import Config
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.preflight import check
from moe_dist.train.build.training import EngineContext, LoopSettings, Training, build_loader, loop_settings
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
    "loss.balance.scope": "micro_batch",  # Megatron has only this scope
    "optimizer.eps": 1e-5,  # large enough that rounding of a gradient near zero makes no full Adam step
    "placement": {"policy": "interleaved"},
    "evaluation.balance_efficiency": False,
    "evaluation.ablate_experts": False,
}


def config_of(data: str | Path, root: str | Path, changes: Mapping[str, Any]) -> Config:
    """Returns the run's configuration with `changes` by dotted key."""
    return tiny_config(Path(data), Path(root), {**CHANGES, **changes})


def ranks(ep: int, edp: int = 1) -> dict[str, Any]:
    """The change that sets the number of ranks."""
    return {"parallel.ep": ep, "parallel.edp": edp}


def megatron(**engine: Any) -> dict[str, Any]:
    """Returns the changes that select Megatron-Core on a CPU."""
    return {"engine": {"kind": "megatron", "cpu_trial": True, **engine}, "loss.balance.scope": "micro_batch"}


@dataclass(frozen=True)
class Run:
    """A built run before its first step."""

    config: Config
    mesh: Mesh
    placement: ExpertPlacement
    training: Training
    loader: Any
    plan: LoopSettings

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        model: Any = self.training.parallel.model
        for chunk in model.gpt.chunks if hasattr(model, "gpt") else [model]:
            yield from chunk.parameters()


@contextmanager
def started_run(rank: RankContext, data: str, changes: Mapping[str, Any]) -> Iterator[Run]:
    """Builds a run on all ranks of this world, with the engine of `changes`."""
    torch.set_num_threads(1)
    config = config_of(data, rank.folder, changes)
    checked = check(config, world_size=rank.world_size)
    mesh = make_mesh(
        ep=config.parallel.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=config.parallel.dispatch.node_size
    )
    with config.engine.build(EngineContext(config, checked.manifest, checked.placement, mesh)) as training:
        reader, readers = training.parallel.reader
        loader = build_loader(config, checked.manifest, rank=reader, world_size=readers)
        plan = loop_settings(config, checked.manifest, checked.placement)
        yield Run(config, mesh, checked.placement, training, loader, plan)


def step_results(run: Run, first: int, last: int, watchers: Sequence[StepWatcher] = ()) -> list[StepResult]:
    """Takes the steps `first` to `last` - 1, with the watchers."""
    results = []
    for step in range(first, last):
        batches = run.loader.batches(step * run.config.train.global_batch)
        options: dict[str, Any] = {"lr": run.plan.lr(step), "aux": run.plan.aux(step), "number": step}
        results.append(run.training.step(batches, watchers=watchers, **options))
    return results


def take_steps(run: Run, first: int, last: int, watchers: Sequence[StepWatcher] = ()) -> list[dict[str, Any]]:
    """Takes the steps `first` to `last` - 1, with the watchers. Returns a report of each step."""
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
    """Returns a report of each step of a run."""
    with started_run(rank, data, changes) as run:
        return take_steps(run, 0, run.config.train.steps)
