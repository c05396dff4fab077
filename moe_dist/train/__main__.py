"""One rank of a run: `python -m moe_dist.train CONFIG [key=value ...]`; launchers start one such process per rank.

configuration -> preflight -> rank -> process groups -> model on its mesh -> data -> resume -> Trainer.fit
"""

import contextlib
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.runtime.attempt import Attempt
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.environment import RankEnv, limit_fragmentation, share_cores
from moe_dist.runtime.log import Startup
from moe_dist.runtime.near_cpus import bind_near_gpu
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopRequest
from moe_dist.runtime.status import record_save_seconds


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
            if not checked.config.parallel.dispatch.needs_modules:  # DeepEP and HybridEP share memory that must not grow
                limit_fragmentation(os.environ)
            if checked.config.parallel.device != "cpu":
                bind_near_gpu(env.local_rank, env.local_world_size, os.environ, lower_threads=shared)
            train(checked, env, attempt, stop)
        elif env.rank == 0:
            print(RunFolder.of(checked.config).finished_text(checked.config))
    return attempt.exit_code


def train(checked: Preflight, env: RankEnv, attempt: Attempt, stop: StopRequest) -> None:
    """Builds process groups, model and data loader, loads a checkpoint, and trains. Runs on every rank."""
    startup = Startup(enabled=env.rank == 0)
    startup.now("importing torch")
    from moe_dist.checkpoint.manager import CheckpointManager
    from moe_dist.monitor.costs import costs_markdown
    from moe_dist.parallel.determinism import make_deterministic
    from moe_dist.parallel.mesh import destroy_world
    from moe_dist.runtime.log import setup_logging
    from moe_dist.train.build import training as build
    from moe_dist.train.loop import session
    from moe_dist.train.loop.fixed_top_k import beside_fixed_top_k
    from moe_dist.train.loop.garbage import collected_by_steps
    from moe_dist.train.loop.profiling import profiled_steps
    from moe_dist.train.loop.trainer import WINDOW, Trainer
    from moe_dist.train.rank_balance.levers import LeverParts, build_levers
    from moe_dist.train.rank_balance.placement_rows import build_placement_rows
    from moe_dist.train.start.resume import Resumable
    from moe_dist.train.step.tracing import traced_steps

    config, manifest, placement = checked.config, checked.manifest, checked.placement
    if config.parallel.deterministic:
        make_deterministic()  # called before the first CUDA call, which reads the variables that `make_deterministic` sets
    folder = attempt.open(config, stopped=lambda: stop.requested)  # rank 0 waits until it holds the run's lease
    log = setup_logging(env, folder)
    startup.now("waiting for the other ranks")
    mesh = session.join_world(config, env, folder, attempt, stopped=lambda: stop.requested)
    watchdog = session.start_watchdog(config, env, folder, mesh.tracker, attempt)
    startup.now("building the model")
    stack = contextlib.ExitStack()  # the stack is not closed after an error, because a failed rank ends its process
    training = stack.enter_context(config.engine.build(build.EngineContext(config, manifest, placement, mesh)))
    startup.now("reading data")
    reader, readers = training.parallel.reader
    loader = build.build_loader(config, manifest, rank=reader, world_size=readers)
    evaluator = build.build_evaluator(config, manifest, training, placement)
    startup.now("looking for a checkpoint, and loading it")
    checkpoints = CheckpointManager(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        lease_check=attempt.check_commit,
        process_group=mesh.checkpoint,
        tracker=mesh.tracker,
    )
    report_save = partial(record_save_seconds, folder.logs)
    levers = build_levers(LeverParts(config, placement, training, loader))
    resumable = Resumable(training, placement, checkpoints, config, manifest, levers=levers, report_save=report_save)
    progress = resumable.restore()
    checked = replace(
        checked, placement=training.step.placement
    )  # the run may have moved experts before it saved the checkpoint
    resumable.placement = evaluator.placement = checked.placement
    startup.done()
    attempt.follow(lambda: progress.step)
    log.follow(lambda: progress.step)
    with (
        session.watched_devices(config, mesh.device, env) as devices,
        profiled_steps(config, training.parallel.model, mesh.device, folder, env) as profile,
        traced_steps(
            checked,
            folder,
            env,
            attempt_id=attempt.attempt_id,
            step=progress.step,
            position=progress.position,
            numbers=loader.numbers,
        ) as tracer,
        session.open_sinks(checked, folder, env, attempt, progress=progress) as sinks,
        collected_by_steps(),
    ):
        placement_rows = build_placement_rows(config, checked, mesh, last=WINDOW)
        trainer = Trainer(
            build.loop_settings(config, manifest, checked.placement, session.card_name(config, mesh)),
            training.step,
            loader,
            evaluator,
            sinks=sinks,
            devices=devices,
            saver=resumable,
            stop=stop,
            progress=progress,
            profile=profile,
            watchers=[each for each in (tracer, placement_rows) if each is not None],
            levers=levers,
            placement_rows=placement_rows,
        )
        finished = trainer.fit()
        watchdog.stop()  # a running watchdog would end the ranks that wait until rank 0 has closed its sinks
        beside = beside_fixed_top_k(config, manifest, finished.evaluation) if sinks else ""
        costs = "" if finished.costs is None else costs_markdown(finished.costs)
        for sink in sinks:
            for title, text in {"fixed top-k": beside, "cost table": costs}.items():
                if text:
                    sink.text(title, text)
        attempt.finish()
    # All ranks wait for rank 0's summary, because a launcher kills the ranks that still run after another rank has ended.
    checkpoints.agree("write the summary", lambda: session.conclude(finished, folder, checked, beside=beside))
    if env.rank == 0 and stop.first is not None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal must not fail a finished run
            print(f"{stop.first.name} came too late to stop the run: it is complete", file=sys.stderr)
    stack.close()
    destroy_world()


def _dry_run(config: Path, overrides: list[str], tokens_per_second: float | None) -> int:
    from moe_dist.train.start.dry_run import dry_run

    dry_run(load_config(config, overrides), tokens_per_second=tokens_per_second)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
