"""Runs the attempts (starts) of a run for the local and the Ray launcher, and restarts the run."""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable

from launchers.rank_tracker import Outcome
from launchers.restart import AttemptEnd, committed_step, is_final, why_not_restarted
from launchers.verdict import conclude, say_cause
from moe_dist.config.schema import Config
from moe_dist.runtime.lease import read_holder
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopSignals

RunAttempt = Callable[[int, str], Outcome]  # runs one attempt, given the number of earlier restarts and attempt_id


def inspect_folder(folder: RunFolder, config: Config, *, overwrite: bool) -> Start:
    """Returns the action of the next start: begin the run, resume it, or do nothing because it is finished. Prints the
    summary of a finished run. With `overwrite`, first renames the folder of an old run."""
    if overwrite and (old := folder.move_aside()) is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    start = folder.inspect(config)
    if start is Start.FINISHED:
        print(folder.finished_text(config))
    return start


def run_attempts(
    folder: RunFolder,
    run: RunAttempt,
    signals: StopSignals,
    *,
    prefix: str,
    max_restarts: int,
    blame: Callable[[int], None] = lambda rank: None,
) -> int:
    """Runs attempts until one ends in a way that allows no restart. Returns the last attempt's exit code.
    After each failed attempt, calls `blame` with the rank at fault."""
    attempts: list[AttemptEnd] = []
    while True:
        begin = committed_step(folder.checkpoints)  # newest committed step before the attempt
        # The id becomes part of file names; the random suffix makes it unique.
        attempt_id = f"{prefix}-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        restarts, started = len(attempts), time.monotonic()
        outcome = run(restarts, attempt_id)
        verdict = conclude(folder, attempt_id, outcome, restarts=restarts, lasted=time.monotonic() - started)
        # A node that shuts down sends SIGTERM to its ranks before it is lost. This SIGTERM is no request to stop.
        asked = signals.first is not None or (outcome.stop is not None and not outcome.lost)
        attempts.append(AttemptEnd(verdict.code, begin, committed_step(folder.checkpoints), asked))
        ended, obstacle = asked or is_final(verdict.code), None  # a stop signal may also have come between two attempts
        if not ended:
            if verdict.rank is not None:
                blame(verdict.rank)
            limit = why_not_restarted(attempts, max_restarts, option="--max-restarts")
            obstacle = limit or _other_writer(folder, attempt_id)
        if obstacle is not None and max_restarts:
            print(f"not restarted: {obstacle}", file=sys.stderr)
        if ended or obstacle is not None:
            say_cause(folder, attempt_id, verdict)
            return verdict.code
        step = f"the checkpoint of step {attempts[-1].end}" if attempts[-1].end else "the beginning"
        cause = verdict.reason.partition("\n")[0]
        print(f"restart {len(attempts)} of {max_restarts}, from {step}: {cause}", file=sys.stderr)


def begin_logs(folder: RunFolder, num_ranks: int, attempt_id: str) -> None:
    """Writes a header line for the attempt into each rank's log; `verdict.last_output` begins after this line."""
    for rank in range(num_ranks):
        with contextlib.suppress(OSError), folder.log_of(rank).open("ab", buffering=0) as log:  # ranks report a full disk
            log.write(f"--- attempt {attempt_id}, {time.strftime('%F %T %z')}\n".encode())


def _other_writer(folder: RunFolder, attempt_id: str) -> str | None:
    """Returns a message if another live attempt holds the run's lease (the right to write to the run folder); None
    otherwise. A restart would only wait for the end of that attempt."""
    holder = read_holder(folder.lease_json)
    if holder is None or holder.attempt_id == attempt_id or holder.is_dead():  # a restart takes over an abandoned lease
        return None
    return f"{holder} writes to this run"
