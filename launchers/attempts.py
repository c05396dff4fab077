"""Runs the attempts (starts) of a run for the local and the Ray launcher, reports why they ended, and restarts the run."""

import contextlib
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.rank_tracker import Outcome
from launchers.restart import STOPPED, AttemptEnd, committed_step, is_final, why_not_restarted
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED
from moe_dist.runtime.lease import WAIT_SECONDS, read_holder
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopSignals

# Type of a function that runs an attempt: (restarts before the attempt, attempt_id) -> (outcome, byte offset in each rank's
# log where the attempt's output begins)
RunAttempt = Callable[[int, str], tuple[Outcome, Sequence[int]]]


def inspect_folder(folder: RunFolder, config: Config, *, overwrite: bool) -> Start:
    """Returns what the next start does: begin the run, resume the run, or nothing because the run is finished. Prints the
    summary of a finished run. With `overwrite`, first renames the folder of an old run."""
    if overwrite and (old := folder.move_aside()) is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    start = folder.inspect(config)
    if start is Start.FINISHED:
        print(folder.finished_text(config))
    return start


def run_attempts(
    folder: RunFolder, run: RunAttempt, signals: StopSignals, *, prefix: str, max_restarts: int, option: str
) -> int:
    """Runs an attempt, and another one after each failure that allows a restart; returns the last attempt's exit code.

    Args:
        prefix: Start of every attempt_id.
        option: Name of the command line option for `max_restarts`, for messages.
    """
    attempts: list[AttemptEnd] = []
    while True:
        begin = committed_step(folder.checkpoints)  # compared with the newest committed step after the attempt
        # The id becomes part of file names; the random suffix makes it unique.
        attempt_id = f"{prefix}-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        outcome, offsets = run(len(attempts), attempt_id)
        code, reason = conclude(folder, attempt_id, outcome, offsets)
        attempts.append(AttemptEnd(code, begin, committed_step(folder.checkpoints)))
        # A stop signal may also have come between two attempts. Not a request to stop is the SIGTERM that ranks get from a
        # node that shuts down and is then lost.
        if signals.first is not None or (outcome.stop is not None and not outcome.lost) or is_final(code):
            return code
        obstacle = why_not_restarted(attempts, max_restarts, option=option) or _other_writer(folder, attempt_id)
        if obstacle is not None:
            if max_restarts:
                print(f"not restarted: {obstacle}", file=sys.stderr)
            return code
        step = f"the checkpoint of step {attempts[-1].end}" if attempts[-1].end else "the beginning"
        print(f"restart {len(attempts)} of {max_restarts}, from {step}: {reason.partition(chr(10))[0]}", file=sys.stderr)


def begin_logs(folder: RunFolder, num_ranks: int, attempt_id: str) -> list[int]:
    """Writes a header line for the attempt into each rank's log; returns for each rank the byte offset after this line."""
    offsets = []
    for rank in range(num_ranks):
        with folder.log_of(rank).open("ab", buffering=0) as log:
            with contextlib.suppress(OSError):  # the ranks themselves report a full disk
                log.write(f"--- attempt {attempt_id}, {time.strftime('%F %T %z')}\n".encode())
            offsets.append(log.tell())
    return offsets


def conclude(folder: RunFolder, attempt_id: str, outcome: Outcome, offsets: Sequence[int]) -> tuple[int, str]:
    """Prints on standard error why an attempt failed. Writes the attempt's verdict (the recorded exit code) and the reason
    into status.json, unless a rank has recorded the cause itself. Returns verdict and reason."""
    record = folder.read_status().of(attempt_id)
    verdict = record.verdict if record is not None else None
    reason = record.reason if record is not None else ""
    cause = outcome.first_failed
    if cause is not None and verdict == STOPPED and outcome.stop is None:
        verdict = None  # the launcher sent SIGTERM after a rank failed, and another rank took SIGTERM for a stop request
    if cause is not None and not outcome.silent and verdict and record is not None and record.rank is not None:
        cause = record.rank  # this rank recorded its error first; a rank that failed because of this error may end first
    if verdict == EXIT_DONE:
        if cause is not None:  # rank `cause` failed after the last save, for example while it closed its metrics
            print(f"rank {cause} failed after the run was done: {_describe_end(outcome, cause)}", file=sys.stderr)
        return EXIT_DONE, reason
    if outcome.aborted:
        print("killed; the last checkpoint is intact", file=sys.stderr)
    elif outcome.stop is not None and outcome.unready:
        print(
            f"{outcome.stop.name} came before the ranks were ready; nothing was lost, start the run again", file=sys.stderr
        )
        return STOPPED, reason
    elif outcome.first_failed is not None and verdict == STOPPED and not outcome.silent:
        failed = outcome.first_failed
        print(
            f"the run stopped on request, but rank {failed} did not: {_describe_end(outcome, failed)}, see "
            f"{folder.log_of(failed)}",
            file=sys.stderr,
        )
    elif cause is not None:
        if outcome.silent or verdict is None:
            detail = _last_problem(last_output(folder.log_of(cause), offsets[cause])) if not outcome.silent else ""
            if cause in outcome.frozen:
                detail = reason  # the collective that timed out, and its time, on a rank that waited for the frozen rank
            end = _describe_end(outcome, cause) + (f"; {detail}" if detail else "")
            reason = f"rank {cause}{_where(outcome, cause)}: {end}"
            # A rank that fails before it opens the run folder exits with its verdict but cannot record the verdict.
            verdict = outcome.exit_code if not outcome.silent and is_final(outcome.exit_code) else EXIT_FAILED
            if record is not None:
                last_step = max(record.last_step, committed_step(folder.checkpoints))
                # Because a killed rank 0 still holds the lease, `amend_status` waits until the lease can be taken over.
                wait = WAIT_SECONDS if outcome.codes[0] < 0 else 0.0
                end = {"verdict": verdict, "reason": reason, "rank": cause, "last_step": last_step}
                with contextlib.suppress(OSError):  # on a full disk only the exit code reports the failure
                    folder.amend_status(attempt_id, **end, wait_seconds=wait)
        _report(folder, cause, outcome, offsets[cause])
    return (outcome.exit_code if verdict is None else verdict), reason


def last_output(log: Path, offset: int, *, most_lines: int = 200) -> str:
    """Returns the last traceback in a rank's log after byte `offset`, with the exceptions that caused it. Returns the last
    20 lines if there is no traceback."""
    with log.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().decode(errors="replace").splitlines()
    begins = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    first = begins.pop() if begins else max(0, len(lines) - 20)  # the rank ended with its last traceback
    chained = ("The above exception was the direct cause", "During handling of the above exception")
    while begins and any(line.startswith(chained) for line in lines[max(0, first - 2) : first]):
        first = begins.pop()
    return "\n".join(lines[first:][-most_lines:])


def _last_problem(output: str) -> str:
    """Returns the last line of a rank's output that does not merely refer to a page of the docs."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("see docs/")]
    return lines[-1].strip().removeprefix("- ") if lines else ""


def _other_writer(folder: RunFolder, attempt_id: str) -> str | None:
    """Describes another live attempt that holds the run's lease (the right to write to its folder), because a restart would
    only wait for the end of this attempt. Returns None if no other attempt is alive."""
    holder = read_holder(folder.lease_json)
    if holder is None or holder.attempt_id == attempt_id or holder.is_dead():  # a restart takes over an abandoned lease
        return None
    return f"{holder} writes to this run"


def _report(folder: RunFolder, cause: int, outcome: Outcome, offset: int) -> None:
    log = folder.log_of(cause)
    first = f"rank {cause} failed first ({_describe_end(outcome, cause)}){_where(outcome, cause)}"
    lines = [f"{first}; {log} ends with:", "", last_output(log, offset)]
    others = [f"{rank} ({_describe_end(outcome, rank)})" for rank in range(len(outcome.codes)) if rank != cause]
    if others:
        lines += ["", f"the other ranks ended after it: {', '.join(others)}"]
    print("\n".join(lines), file=sys.stderr)


def _where(outcome: Outcome, rank: int) -> str:
    known = outcome.hosts and rank not in outcome.lost  # the description of a lost rank names its node
    return f" on {outcome.hosts[rank]}" if known else ""


def _describe_end(outcome: Outcome, rank: int) -> str:
    code = outcome.codes[rank]
    if rank in outcome.frozen:
        return "frozen by SIGSTOP, and killed after a peer's collective timed out"
    if rank in outcome.lost:
        return outcome.lost[rank]
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if -code == signal.SIGKILL and rank == outcome.first_failed else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
