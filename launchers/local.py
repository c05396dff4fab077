"""Run on this machine: python -m launchers.local CONFIG [key=value ...] [--nproc N] [--overwrite]"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launchers.command import TRAIN, Plan, RankCommand, file_rendezvous, fit_world_size, rank_commands, threads_per_rank
from launchers.supervise import Outcome, Patience, Ranks, StopSignals, last_words
from moe_dist.config.load import read_draft
from moe_dist.errors import EXIT_FAILED, MoeDistError, StoppedError
from moe_dist.preflight import check_file
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.run_folder import Ending, RunFolder, Start
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

KILL_AFTER_GRACE_SECONDS = 10.0  # the ranks end themselves when the grace is over; this is for one that cannot


def launch(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    overwrite: bool = False,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    program: tuple[str, ...] = TRAIN,
) -> int:
    """Checks a run, starts its ranks on this machine and sees them through. Call it in the main thread.

    Args:
        nproc: Ranks; None takes parallel.ep x parallel.edp. Another multiple of parallel.ep sets parallel.edp.
        overwrite: Move an old run of this name aside.
        program: What each rank's interpreter runs.

    Returns:
        The verdict of the run.

    Raises:
        MoeDistError: found before any process was started.
    """
    read = read_draft(config_path, overrides)
    if read.value is not None:  # else `check_file` tells what is wrong with it
        overrides = (*overrides, *fit_world_size(read.value, nproc))
    config = check_file(config_path, overrides).config
    world_size = config.parallel.ep * config.parallel.edp
    folder = RunFolder.of(config)
    if overwrite and (old := folder.move_aside()) is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    start = folder.inspect(config)
    if start is Start.FINISHED:
        print(folder.read_summary())
        return 0
    print(f"{world_size} ranks; run folder {folder.path} ({start.value}), logs in {folder.logs}", file=sys.stderr)
    attempt_id = f"local-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="moe_dist_") as meeting_place:
        plan = Plan(
            config=config_path,
            overrides=tuple(overrides),
            ranks_per_node=(world_size,),
            rendezvous=file_rendezvous(Path(meeting_place) / "store"),
            attempt=0,
            attempt_id=attempt_id,
            grace_seconds=grace_seconds,
            loopback=True,
            threads=threads_per_rank(world_size, os.environ),
            program=program,
        )
        outcome, offsets = _run(rank_commands(plan), folder, attempt_id, grace_seconds)
    return _conclude(folder, folder.read_status().of(attempt_id), outcome, offsets)


def _run(
    commands: Sequence[RankCommand], folder: RunFolder, attempt_id: str, grace_seconds: float
) -> tuple[Outcome, list[int]]:
    """The outcome, and where this attempt begins in each log."""
    folder.prepare()
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(folder.log_of(command.rank).open("ab")) for command in commands]
        for log in logs:
            log.write(f"--- attempt {attempt_id}, {time.strftime('%F %T %z')}\n".encode())
            log.flush()
        offsets = [log.tell() for log in logs]
        signals = stack.enter_context(StopSignals())
        ranks = Ranks(commands, logs, patience=Patience(stop=grace_seconds + KILL_AFTER_GRACE_SECONDS))
        outcome = ranks.see_through(signals)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor; a killed one does not bring it back
        sys.stdout.flush()
    return outcome, offsets


def _conclude(folder: RunFolder, ending: Ending | None, outcome: Outcome, offsets: Sequence[int]) -> int:
    """Says why the run ended if it was not by its own will, and returns its verdict."""
    verdict = ending.verdict if ending is not None else None
    cause = outcome.first_failed
    if cause is not None and not outcome.sudden and verdict and ending is not None and ending.rank is not None:
        cause = ending.rank  # it wrote the verdict before it left, hence before any peer could fail of it
    if outcome.aborted:
        print("ended at once; what the last checkpoint has is safe", file=sys.stderr)
    elif cause is not None and outcome.stop is not None and outcome.codes[cause] == -outcome.stop:
        print(f"{outcome.stop.name} came before the ranks were ready; nothing was lost, start me again", file=sys.stderr)
        return StoppedError.exit_code
    elif cause is not None:
        _report(folder, cause, outcome, offsets[cause])
    return outcome.exit_code if verdict is None else verdict


def _report(folder: RunFolder, cause: int, outcome: Outcome, offset: int) -> None:
    log = folder.log_of(cause)
    lines = [f"rank {cause} failed first ({_how(outcome.codes[cause])}); {log} ends with:", "", last_words(log, offset)]
    others = [f"{rank} ({_how(code)})" for rank, code in enumerate(outcome.codes) if rank != cause]
    if others:
        lines += ["", f"the other ranks ended after it: {', '.join(others)}"]
    print("\n".join(lines), file=sys.stderr)


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if -code == signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200; later ones win.")] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default parallel.ep x parallel.edp. Sets parallel.edp.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an old run of this name aside.")] = False,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds that a stop may take.")] = DEFAULT_GRACE_SECONDS,
) -> None:
    """Run on this machine, one process a rank. Ctrl-C saves and stops; a second one ends at once."""
    try:
        code = launch(config, overrides or (), nproc=nproc, overwrite=overwrite, grace_seconds=grace)
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"{error}; the run folder is <run.root>/<run.name>: mend it, or choose another run.root", file=sys.stderr)
        code = EXIT_FAILED
    raise typer.Exit(code)


if __name__ == "__main__":
    run_command(main)
