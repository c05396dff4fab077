"""One rank of a run: `python -m moe_dist.train CONFIG [key=value ...]`; launchers start one for each GPU.

configuration -> preflight -> rank -> process groups -> model on its mesh -> data -> resume -> Trainer.fit
"""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.config.load import load_config
from moe_dist.doctor.start import check_at_start
from moe_dist.errors import EXIT_DONE
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.log import Startup
from moe_dist.runtime.place import Found, RunPlace, check_place
from moe_dist.runtime.rendezvous import shared_with_rank_0
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopRequest
from moe_dist.runtime.status import record_save_seconds


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, see configs/README.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in train.steps=200.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time; no GPU, no data.")] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Of all ranks, for the dry run's hours.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an existing run of that name aside.")] = False,
    init_from: Annotated[str | None, typer.Option(help="The same as run.init_from=PATH: begin with those weights.")] = None,
) -> None:
    """Trains, or goes on with, the run that CONFIG describes."""
    overrides = [*(overrides or []), *([f"run.init_from={init_from}"] if init_from is not None else [])]
    with reports_errors():
        raise typer.Exit(
            _dry_run(config, overrides, tokens_per_second) if dry_run else _attempt(config, overrides, overwrite)
        )


def _attempt(config: Path, overrides: list[str], overwrite: bool) -> int:
    """One attempt of the run on this rank; returns its verdict."""
    env = RankEnv.from_environment(os.environ)
    attempt = Attempt(env)
    with StopRequest(env.grace_seconds, attempt.expire, told=env.rank == 0) as stop, attempt:  # before torch is imported
        plan = check_file(config, overrides, world_size=env.world_size)
        start = RunFolder.of(plan.config).start(plan.config, env, overwrite=overwrite)
        if start is not Start.FINISHED:
            train(plan, env, attempt, stop)
        elif env.rank == 0:
            print(RunFolder.of(plan.config).read_summary())
    return attempt.exit_code


def train(plan: Preflight, env: RankEnv, attempt: Attempt, stop: StopRequest) -> None:
    """Builds everything in order, then fits. Runs on every rank."""
    startup = Startup(enabled=env.rank == 0)
    startup.now("importing torch")
    from moe_dist.checkpoint.manager import CheckpointManager
    from moe_dist.parallel.determinism import make_deterministic
    from moe_dist.parallel.mesh import destroy_world, init_world, make_mesh
    from moe_dist.parallel.rendezvous import published_store
    from moe_dist.runtime.log import setup_logging
    from moe_dist.train import build, session
    from moe_dist.train.resume import Resumable
    from moe_dist.train.trainer import Trainer

    config = plan.config
    if config.parallel.deterministic:
        make_deterministic()
    folder = attempt.open(config, stopped=lambda: stop.requested)
    log = setup_logging(env, folder)
    device = session.choose_device(config, env)
    timeout = config.parallel.timeout_seconds
    startup.now("waiting for the other ranks")
    with shared_with_rank_0(folder.path, env):
        check_place(RunPlace.from_environment(os.environ), Found.from_environment(os.environ))
        check_at_start(config, env, folder.path)
        with published_store(env, folder.path, timeout=timeout) as store:
            init_world(env.init_method, store, rank=env.rank, world_size=env.world_size, device=device, timeout=timeout)
    mesh = make_mesh(
        ep=config.parallel.ep, device=device, timeout=timeout, ranks_per_node=config.parallel.dispatch.node_size
    )
    watchdog = session.start_watchdog(config, env, folder, mesh.tracker, attempt)
    startup.now("building the model")
    training = build.build_training(config, plan.manifest, plan.placement, mesh)
    startup.now("reading data")
    loader = build.build_loader(config, plan.manifest, rank=mesh.rank, world_size=mesh.world_size)
    evaluator = build.build_evaluator(config, plan.manifest, training, plan.placement)
    checkpoints = CheckpointManager(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        lease_check=attempt.check_commit,
        process_group=mesh.checkpoint,
        tracker=mesh.tracker,
    )
    resumable = Resumable(
        training,
        plan.placement,
        checkpoints,
        config,
        plan.manifest,
        controllers=training.controllers(),
        report_save=partial(record_save_seconds, folder.logs),
    )
    startup.now("looking for a checkpoint, and loading it")
    progress = resumable.restore()
    startup.done()
    attempt.last_step = lambda: progress.step
    log.follow(lambda: progress.step)
    with (
        session.watched_devices(config, device, env) as devices,
        session.open_sinks(plan, folder, env, attempt, progress=progress) as sinks,
    ):
        trainer = Trainer(
            build.build_plan(config, plan.groups),
            training.step,
            loader,
            evaluator,
            placement=plan.placement,
            sinks=sinks,
            devices=devices,
            saver=resumable,
            stop=stop,
            progress=progress,
            modalities=tuple(plan.manifest.modalities),
            baselines=plan.manifest.baselines,
        )
        finished = trainer.fit()
    if env.rank == 0:
        session.conclude(finished, folder, plan)
        if stop.first is not None:  # it came during the final evaluation
            print(f"{stop.first.name} came after the last step: the run is complete", file=sys.stderr)
    watchdog.stop()
    destroy_world()


def _dry_run(config: Path, overrides: list[str], tokens_per_second: float | None) -> int:
    from moe_dist.train.dry_run import dry_run

    dry_run(load_config(config, overrides), tokens_per_second=tokens_per_second)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
