"""Starts a run on this machine: python -m launchers.local CONFIG [key=value ...] [--nproc N] [--overwrite]"""

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from launchers.attempts import begin_logs, inspect_folder, run_attempts
from launchers.command import (
    TRAIN,
    JobPlan,
    LaunchPlan,
    commands_text,
    file_rendezvous,
    fit_world_size,
    one_node,
    rank_commands,
)
from launchers.fit import check_graces
from launchers.launcher import ConfigPath, Examination, Launcher, Overrides, Overwrite
from launchers.rank_tracker import Outcome, ShutdownTimeouts
from launchers.supervise import Ranks
from moe_dist.config.cluster import MAX_RESTARTS, Cluster
from moe_dist.config.load import read_draft
from moe_dist.errors import EXIT_DONE, ResourceError
from moe_dist.plan.preflight import PlannedLayout, check_file, layout_of_file
from moe_dist.runtime.command_line import RUN_FOLDER_FIX, reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult, note
from moe_dist.runtime.node.checks import check_cores, check_nodes
from moe_dist.runtime.node.facts import nvml
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS, StopSignals

KILL_AFTER_GRACE_SECONDS = 10.0  # a rank is killed if it still runs this many seconds after the grace period
STORE_PREFIX = "moe_dist_store_"  # prefix of the names of rendezvous folders in the system's temporary folder
NEW_STORE_SECONDS = 60.0  # age from which an unlocked folder is deleted; a newer folder may not have been locked yet


def launch(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    overwrite: bool = False,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    max_restarts: int = 0,
    program: tuple[str, ...] = TRAIN,
    dry_run: bool = False,
) -> int:
    """Checks a run, starts its ranks on this machine and waits for their end. Failed ranks are restarted from the last
    checkpoint. Must be called in the main thread, because the function installs signal handlers. Returns the run's exit
    code. Raises MoeDistError before any process is started if the run is invalid.

    Args:
        nproc: Number of ranks; by default parallel.ep x parallel.edp. If `nproc` is another multiple of parallel.ep,
            parallel.edp is changed to match.
        overwrite: Rename the folder of an old run of this name before the first attempt; restarts keep the new folder.
        program: Arguments of each rank's Python interpreter that precede the configuration's path.
        dry_run: Print the commands and variables of the ranks, and start nothing. A dry run needs no data.
    """
    read = read_draft(config_path, overrides)
    if read.value is not None:  # an invalid configuration is reported by `check_file` below
        overrides = (*overrides, *fit_world_size(read.value, nproc))
    config = (layout_of_file if dry_run else check_file)(config_path, overrides).config
    world_size = config.parallel.ep * config.parallel.edp
    folder = RunFolder.of(config)

    def plan(restarts: int, attempt_id: str, store: str) -> LaunchPlan:
        return LaunchPlan(
            config=config_path,
            overrides=tuple(overrides),
            job=one_node(world_size),
            rendezvous=file_rendezvous(Path(store) / "store"),
            attempt=restarts,
            attempt_id=attempt_id,
            grace_seconds=grace_seconds,
            loopback=True,
            program=program,
        )

    if config.parallel.device == "cuda" and not dry_run:
        gpus, driver = nvml()
        if not gpus:
            problem = f"parallel.device=cuda: this machine shows no GPU ({driver}); set parallel.device=cpu"
            raise ResourceError(problem, see="docs/gpu.md")
    if dry_run:
        print(commands_text(rank_commands(plan(0, "local-ID", "/tmp/moe_dist_ID"))))
        return EXIT_DONE
    start = inspect_folder(folder, config, overwrite=overwrite)
    if start is Start.FINISHED:
        return 0
    print(f"{world_size} ranks; run folder {folder.path} ({start.value}), logs in {folder.logs}", file=sys.stderr)

    with StopSignals() as signals:  # also handles signals between two attempts

        def run(restarts: int, attempt_id: str) -> Outcome:
            with store_folder() as store:
                return _run(plan(restarts, attempt_id, store), folder, signals)

        return run_attempts(folder, run, signals, prefix="local", max_restarts=max_restarts)


@contextlib.contextmanager
def store_folder() -> Iterator[str]:
    """Makes a folder of mode 0700 for the rendezvous, so that no other user can join. Also deletes the rendezvous folders
    of killed launchers. They are no longer locked, because the kernel releases the locks of a dead process."""
    for old in Path(tempfile.gettempdir()).glob(f"{STORE_PREFIX}*"):
        with contextlib.suppress(OSError):  # raised if the folder's launcher still runs and holds the lock
            found = old.lstat()
            if found.st_uid == os.geteuid() and time.time() - found.st_mtime > NEW_STORE_SECONDS:
                with (old / "lock").open("ab") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=STORE_PREFIX) as folder, (Path(folder) / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder


def _run(plan: LaunchPlan, folder: RunFolder, signals: StopSignals) -> Outcome:
    """Runs one attempt."""
    folder.prepare()  # called in each attempt, because the folder may have been deleted since the last attempt
    commands = rank_commands(plan)
    begin_logs(folder, len(commands), plan.attempt_id)
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(folder.log_of(command.rank).open("ab", buffering=0)) for command in commands]
        ranks = Ranks(commands, logs, timeouts=ShutdownTimeouts(stop=plan.grace_seconds + KILL_AFTER_GRACE_SECONDS))
        outcome = ranks.supervise(signals)  # blocks until all ranks have ended
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # shows the cursor, which a killed progress bar leaves hidden
        sys.stdout.flush()
    return outcome


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default parallel.ep x parallel.edp. Sets parallel.edp.")
    ] = None,
    overwrite: Overwrite = False,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds for saving and stopping.")] = DEFAULT_GRACE_SECONDS,
    max_restarts: Annotated[int, typer.Option(min=0, help="Automatic restarts from the last checkpoint.")] = MAX_RESTARTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the ranks' commands; start nothing.")] = False,
    init_from: Annotated[str | None, typer.Option(help="Start from these weights, as run.init_from=PATH.")] = None,
) -> None:
    """Run on this machine, one process per rank. Ctrl-C saves a checkpoint and stops; a second Ctrl-C kills the run."""
    overrides = [*(overrides or []), *([f"run.init_from={init_from}"] if init_from is not None else [])]
    options = {"nproc": nproc, "overwrite": overwrite, "grace_seconds": grace, "max_restarts": max_restarts}
    with reports_errors(storage=RUN_FOLDER_FIX):
        raise typer.Exit(launch(config, overrides, dry_run=dry_run, **options))


class LocalLauncher(Launcher):
    """Starts a run on this machine, with one process per rank."""

    main = staticmethod(main)

    def plan(self, layout: PlannedLayout, cluster: Cluster) -> JobPlan:
        return one_node(layout.config.parallel.ep * layout.config.parallel.edp)

    def examine(self, asked: Examination) -> Iterator[CheckResult]:
        yield from check_nodes([asked.here], asked.needs)
        yield check_cores([asked.here], asked.needs)
        yield check_graces({"until the launcher kills (--grace)": DEFAULT_GRACE_SECONDS}, asked.save_seconds)
        if asked.probe or asked.fabric:
            yield note("probe", "this node was checked directly; --probe and --fabric need a launcher for clusters")


if __name__ == "__main__":
    run_command(main)
