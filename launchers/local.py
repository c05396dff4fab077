"""Run on this machine: python -m launchers.local CONFIG [key=value ...] [--nproc N] [--overwrite]"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from launchers.command import (
    TRAIN,
    Plan,
    RankCommand,
    file_rendezvous,
    fit_world_size,
    one_node,
    rank_commands,
    threads_per_rank,
)
from launchers.restart import DEFAULT_MAX_RESTARTS, Ended, committed_step, is_final, refusal
from launchers.supervise import Outcome, Patience, Ranks, StopSignals, last_words
from moe_dist.config.load import read_draft
from moe_dist.errors import EXIT_FAILED, MoeDistError, StoppedError
from moe_dist.preflight import check_file
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.lease import read_holder
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

KILL_AFTER_GRACE_SECONDS = 10.0  # the ranks end themselves when the grace is over; this is for one that cannot


def launch(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    nproc: int | None = None,
    overwrite: bool = False,
    grace_seconds: float = DEFAULT_GRACE_SECONDS,
    max_restarts: int = 0,
    program: tuple[str, ...] = TRAIN,
) -> int:
    """Checks a run, starts its ranks on this machine and sees them through, again from the last checkpoint where they
    failed. Call it in the main thread.

    Args:
        nproc: Ranks; None takes parallel.ep x parallel.edp. Another multiple of parallel.ep sets parallel.edp.
        overwrite: Move an old run of this name aside, once: a restart goes on with the new one.
        max_restarts: How often a failure is followed by a new start, see `launchers.restart`.
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
    threads = threads_per_rank(world_size, os.environ)

    def plan(restarts: int, attempt_id: str, meeting_place: str) -> Plan:
        return Plan(
            config=config_path,
            overrides=tuple(overrides),
            job=one_node(world_size),
            rendezvous=file_rendezvous(Path(meeting_place) / "store"),
            attempt=restarts,
            attempt_id=attempt_id,
            grace_seconds=grace_seconds,
            loopback=True,
            threads=threads,
            program=program,
        )

    return _until_it_ends(folder, plan, grace_seconds=grace_seconds, max_restarts=max_restarts)


def _until_it_ends(
    folder: RunFolder, plan: Callable[[int, str, str], Plan], *, grace_seconds: float, max_restarts: int
) -> int:
    """One attempt after the other, each with a rendezvous of its own, until one is not followed by a restart."""
    attempts: list[Ended] = []
    with StopSignals() as signals:  # also while no rank runs
        while True:
            begin = committed_step(folder.checkpoints)
            attempt_id = f"local-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
            with tempfile.TemporaryDirectory(prefix="moe_dist_") as meeting_place:
                commands = rank_commands(plan(len(attempts), attempt_id, meeting_place))
                outcome, offsets = _run(commands, folder, attempt_id, signals, grace_seconds)
            code, reason = _conclude(folder, attempt_id, outcome, offsets)
            attempts.append(Ended(code, begin, committed_step(folder.checkpoints)))
            if signals.first is not None or is_final(code):
                return code
            no = refusal(attempts, max_restarts) or _taken(folder, attempt_id)
            if no is not None:
                if max_restarts:
                    print(f"not restarted: {no}", file=sys.stderr)
                return code
            step = f"the checkpoint of step {attempts[-1].end}" if attempts[-1].end else "the beginning"
            print(
                f"restart {len(attempts)} of {max_restarts}, from {step}: {reason.partition(chr(10))[0]}", file=sys.stderr
            )


def _taken(folder: RunFolder, attempt_id: str) -> str | None:
    """Whether somebody else writes to the run: then starting again only waits again."""
    holder = read_holder(folder.lease_json)
    if holder is None or holder.attempt_id == attempt_id or holder.is_dead():
        return None
    return f"{holder} writes to this run"


def _run(
    commands: Sequence[RankCommand], folder: RunFolder, attempt_id: str, signals: StopSignals, grace_seconds: float
) -> tuple[Outcome, list[int]]:
    """The outcome, and where this attempt begins in each log."""
    folder.prepare()
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(folder.log_of(command.rank).open("ab", buffering=0)) for command in commands]
        for log in logs:
            with contextlib.suppress(OSError):  # a full disk: the ranks say so, if it matters to them
                log.write(f"--- attempt {attempt_id}, {time.strftime('%F %T %z')}\n".encode())
        offsets = [log.tell() for log in logs]
        ranks = Ranks(commands, logs, patience=Patience(stop=grace_seconds + KILL_AFTER_GRACE_SECONDS))
        outcome = ranks.see_through(signals)
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor; a killed one does not bring it back
        sys.stdout.flush()
    return outcome, offsets


def _conclude(folder: RunFolder, attempt_id: str, outcome: Outcome, offsets: Sequence[int]) -> tuple[int, str]:
    """Says why an attempt ended if it was not by its own will, puts that into status.json where the ranks could not, and
    returns its verdict and the reason."""
    ending = folder.read_status().of(attempt_id)
    verdict = ending.verdict if ending is not None else None
    reason = ending.reason if ending is not None else ""
    cause = outcome.first_failed
    if cause is not None and not outcome.silent and verdict and ending is not None and ending.rank is not None:
        cause = ending.rank  # it wrote the verdict before it left, hence before any peer could fail of it
    if outcome.aborted:
        print("ended at once; what the last checkpoint has is safe", file=sys.stderr)
    elif cause is not None and outcome.stop is not None and outcome.codes[cause] == -outcome.stop:
        print(f"{outcome.stop.name} came before the ranks were ready; nothing was lost, start me again", file=sys.stderr)
        return StoppedError.exit_code, reason
    elif cause is not None:
        if outcome.silent or verdict is None:
            said = last_words(folder.log_of(cause), offsets[cause]).rpartition("\n")[2] if not outcome.silent else ""
            if cause in outcome.frozen:
                said = reason  # of the peer that waited: in which collective, and how long
            reason = f"rank {cause}: {_how(outcome, cause)}" + (f"; {said}" if said else "")
        if ending is not None and (outcome.silent or verdict is None):
            verdict = EXIT_FAILED
            last_step = max(ending.last_step, committed_step(folder.checkpoints))
            with contextlib.suppress(OSError):  # a full disk: the exit code still tells
                folder.amend_status(attempt_id, verdict=verdict, reason=reason, rank=cause, last_step=last_step)
        _report(folder, cause, outcome, offsets[cause])
    return (outcome.exit_code if verdict is None else verdict), reason


def _report(folder: RunFolder, cause: int, outcome: Outcome, offset: int) -> None:
    log = folder.log_of(cause)
    lines = [f"rank {cause} failed first ({_how(outcome, cause)}); {log} ends with:", "", last_words(log, offset)]
    others = [f"{rank} ({_how(outcome, rank)})" for rank in range(len(outcome.codes)) if rank != cause]
    if others:
        lines += ["", f"the other ranks ended after it: {', '.join(others)}"]
    print("\n".join(lines), file=sys.stderr)


def _how(outcome: Outcome, rank: int) -> str:
    """How a rank ended, in words."""
    code = outcome.codes[rank]
    if rank in outcome.frozen:
        return "frozen by SIGSTOP, and killed when a peer had waited too long"
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if -code == signal.SIGKILL and rank == outcome.first_failed else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


def main(
    config: Annotated[Path, typer.Argument(help="Configuration of the run, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200; later ones win.")] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default parallel.ep x parallel.edp. Sets parallel.edp.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an old run of this name aside.")] = False,
    grace: Annotated[float, typer.Option(min=1.0, help="Seconds that a stop may take.")] = DEFAULT_GRACE_SECONDS,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="New starts from the last checkpoint after failures that may pass.")
    ] = DEFAULT_MAX_RESTARTS,
) -> None:
    """Run on this machine, one process a rank. Ctrl-C saves and stops; a second one ends at once."""
    options = {"nproc": nproc, "overwrite": overwrite, "grace_seconds": grace, "max_restarts": max_restarts}
    try:
        code = launch(config, overrides or (), **options)
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"{error}; the run folder is <run.root>/<run.name>: mend it, or choose another run.root", file=sys.stderr)
        code = EXIT_FAILED
    raise typer.Exit(code)


if __name__ == "__main__":
    run_command(main)
