"""One rank of a run: `python -m moe_dist.train CONFIG [key=value ...]`; launchers start one such process per rank.

configuration -> preflight -> rank -> process groups -> model on its mesh -> data -> resume -> Trainer.fit
"""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.environment import RankEnv, limit_fragmentation, share_cores
from moe_dist.runtime.log import Startup, setup_logging
from moe_dist.runtime.near_cpus import bind_near_gpu
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopRequest


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, see configs/README.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in train.steps=200.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print sizes, memory and time; no GPU, no data.")] = False,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Throughput of all ranks; the dry run computes the hours from it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an existing run of that name aside.")] = False,
    init_from: Annotated[str | None, typer.Option(help="The same as run.init_from=PATH: begin with those weights.")] = None,
) -> None:
    """Starts or resumes the run that CONFIG describes."""
    overrides = [*(overrides or []), *([f"run.init_from={init_from}"] if init_from is not None else [])]
    with reports_errors():
        raise typer.Exit(
            _dry_run(config, overrides, tokens_per_second) if dry_run else _attempt(config, overrides, overwrite)
        )


def _attempt(config: Path, overrides: list[str], overwrite: bool) -> int:
    """Runs one attempt (one start of the run) on this rank and returns the exit code."""
    env = RankEnv.from_environment(os.environ)
    shared = share_cores(env.local_world_size, os.environ)
    attempt = Attempt(env)
    # Stop signals are caught from this line on, also during the import of torch, which takes seconds.
    with StopRequest(env.grace_seconds, attempt.expire, told=env.rank == 0) as stop, attempt:
        checked = check_file(config, overrides, world_size=env.world_size)
        start = RunFolder.of(checked.config).start(checked.config, env, overwrite=overwrite)
        if start is not Start.FINISHED:
            if not checked.config.parallel.dispatch.needs_modules:  # DeepEP and HybridEP share buffers that must not grow
                limit_fragmentation(os.environ)
            if checked.config.parallel.device != "cpu":
                bind_near_gpu(env.local_rank, env.local_world_size, os.environ, lower_threads=shared)
            train(checked, env, attempt, stop)
        elif env.rank == 0:
            print(RunFolder.of(checked.config).finished_text(checked.config))
    return attempt.exit_code


def train(checked: Preflight, env: RankEnv, attempt: Attempt, stop: StopRequest) -> None:
    """Trains the run on this rank: process groups, model, data, checkpoint, evaluator and trainer, then `fit`."""
    startup = Startup(enabled=env.rank == 0)
    startup.now("importing torch")
    from moe_dist.parallel.mesh import destroy_world
    from moe_dist.train.build import training as build
    from moe_dist.train.evaluation.evaluator import Evaluator
    from moe_dist.train.loop import session
    from moe_dist.train.loop.trainer import Trainer
    from moe_dist.train.rank_balance.levers import LeverParts, build_levers
    from moe_dist.train.start.resume import build_resumable

    config, manifest = checked.config, checked.manifest
    folder = attempt.open(config, stopped=lambda: stop.requested)  # rank 0 waits until it holds the run's lease
    log = setup_logging(env, folder)
    startup.now("waiting for the other ranks")
    mesh = session.join_world(config, env, folder, attempt, stopped=lambda: stop.requested)
    watchdog = session.start_watchdog(config, env, folder, mesh.tracker, attempt)
    engine = contextlib.ExitStack()  # not closed after an error, because a failed rank ends its process
    startup.now("building the model")
    training = engine.enter_context(config.engine.build(build.EngineContext(config, manifest, checked.placement, mesh)))
    startup.now("reading data")
    reader, readers = training.parallel.reader
    loader = build.build_loader(config, manifest, rank=reader, world_size=readers)
    startup.now("looking for a checkpoint, and loading it")
    levers = build_levers(LeverParts(config, checked.placement, training, loader))
    saver = build_resumable(training, folder, attempt, config, manifest, checked.placement, levers)
    progress = saver.restore()
    checked = replace(checked, placement=saver.placement)  # the run may have moved experts before it saved the checkpoint
    evaluator = Evaluator(config, manifest, training.parallel, checked.placement, training.step.group_of_modality)
    startup.done()
    for each in (attempt, log):
        each.follow(lambda: progress.step)
    with session.around_steps(checked, training, loader, progress, folder, env, attempt) as around:
        settings = build.loop_settings(config, manifest, checked.placement, session.card_name(config, mesh))
        trainer = Trainer(
            settings, training.step, loader, evaluator, saver=saver, stop=stop, progress=progress, levers=levers, **around
        )
        finished = trainer.fit()
        watchdog.stop()  # a running watchdog would end the ranks that wait until rank 0 has closed its sinks
        beside = session.write_texts(finished, checked, trainer.sinks)
        attempt.finish()
    # All ranks wait for rank 0's summary, because a launcher kills the ranks that still run after another rank has ended.
    saver.status.first(
        "write the summary", lambda: session.conclude(finished, folder, checked, beside=beside, stopped=stop.first)
    )
    engine.close()
    destroy_world()


def _dry_run(config: Path, overrides: list[str], tokens_per_second: float | None) -> int:
    from moe_dist.train.start.dry_run import dry_run

    dry_run(load_config(config, overrides), tokens_per_second=tokens_per_second)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
