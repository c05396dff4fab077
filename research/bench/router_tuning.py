"""Compares the time of a router-tuning step with the time of a step that trains all parameters. Both steps have the same
samples. See docs/router-tuning.md."""

import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.parallel.mesh import Mesh, destroy_world, init_world, make_mesh
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.train.build.training import Training, build_loader, build_training
from moe_dist.train.objective.loss import AuxSettings
from research.bench.measure import Effort, time_interleaved


@reports_errors("bench_router_tuning")
def main(
    config: Annotated[Path, typer.Argument(help="YAML file of a run of router tuning.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in train.micro_batch=8.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each training.")] = 20,
) -> None:
    """Time steps of both trainings in turn, on one process, from initial weights."""
    plan = check_file(config, [*(overrides or []), "parallel.ep=1", "parallel.edp=1"])
    if plan.config.router_tuning is None:
        raise ConfigError(f"{config}: has no section router_tuning, so that there is nothing to compare")
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        init_world(f"file://{folder}/store", rank=0, world_size=1, device=cpu, timeout=600.0)
        try:
            mesh = make_mesh(ep=1, device=cpu, timeout=600.0)
            whole = {"router_tuning": None, "train": plan.config.train.model_copy(update={"only": None})}
            configs = {"router tuning": plan.config, "everything": plan.config.model_copy(update=whole)}
            trainings = {name: build_training(each, plan.manifest, plan.placement, mesh) for name, each in configs.items()}
            seconds = time_interleaved(
                {name: _steps(plan.config, plan, each, mesh) for name, each in trainings.items()}, mesh, Effort(rounds)
            )
        finally:
            destroy_world()
    print(f"{'trained':14} {'seconds a step':>15} {'optimizer state, bytes':>23}")
    for name, each in trainings.items():
        state = sum(value.nbytes for moments in each.optimizer.state.values() for value in moments.values())
        print(f"{name:14} {np.median(seconds[name]):15.3f} {state:23,}")
    ratio = np.median(seconds["router tuning"] / seconds["everything"])
    print(f"median over {rounds} rounds; in a round, router tuning takes {ratio:.2f} of the time")


def _steps(config: Config, plan: Preflight, training: Training, mesh: Mesh) -> Callable[[], object]:
    """Makes a function that takes the next training step at each call. Step n reads the same samples in router tuning and
    in the training of all parameters."""
    loader = build_loader(config, plan.manifest, rank=mesh.rank, world_size=mesh.world_size)
    aux, batch, numbers = AuxSettings(kind="null_averaged", balance=0.0, z=0.0), config.train.global_batch, count()

    def step() -> object:
        number = next(numbers)
        return training.step(loader.batches(number * batch), lr=config.optimizer.lr, aux=aux, number=number)

    return step


if __name__ == "__main__":
    run_command(main)
