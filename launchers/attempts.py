"""One attempt of a run after the other, on whatever machines: what each ended with, and whether another follows."""

import contextlib
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers.ending import Outcome
from launchers.restart import Ended, committed_step, is_final, refusal
from launchers.supervise import StopSignals
from moe_dist.errors import EXIT_FAILED, StoppedError
from moe_dist.runtime.lease import read_holder
from moe_dist.runtime.run_folder import RunFolder

# Starts the ranks and sees them through, given how often the job was restarted and the name of the attempt; returns how
# they ended, and where the attempt begins in each of their logs.
RunAttempt = Callable[[int, str], tuple[Outcome, Sequence[int]]]


def until_it_ends(
    folder: RunFolder, run: RunAttempt, signals: StopSignals, *, prefix: str, max_restarts: int, option: str
) -> int:
    """Runs attempts until one is not followed by a restart; returns the verdict of the last.

    Args:
        signals: Stop signals, caught while no rank runs as well.
        prefix: How names of attempts begin.
        option: The command's name for `max_restarts`.
    """
    attempts: list[Ended] = []
    while True:
        begin = committed_step(folder.checkpoints)
        attempt_id = f"{prefix}-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        outcome, offsets = run(len(attempts), attempt_id)
        code, reason = conclude(folder, attempt_id, outcome, offsets)
        attempts.append(Ended(code, begin, committed_step(folder.checkpoints)))
        if signals.first is not None or is_final(code):
            return code
        no = refusal(attempts, max_restarts, option=option) or _taken(folder, attempt_id)
        if no is not None:
            if max_restarts:
                print(f"not restarted: {no}", file=sys.stderr)
            return code
        step = f"the checkpoint of step {attempts[-1].end}" if attempts[-1].end else "the beginning"
        print(f"restart {len(attempts)} of {max_restarts}, from {step}: {reason.partition(chr(10))[0]}", file=sys.stderr)


def begin_logs(folder: RunFolder, num_ranks: int, attempt_id: str) -> list[int]:
    """Marks the attempt in the log of each rank; returns where it begins in each."""
    offsets = []
    for rank in range(num_ranks):
        with folder.log_of(rank).open("ab", buffering=0) as log:
            with contextlib.suppress(OSError):  # a full disk: the ranks say so, if it matters to them
                log.write(f"--- attempt {attempt_id}, {time.strftime('%F %T %z')}\n".encode())
            offsets.append(log.tell())
    return offsets


def conclude(folder: RunFolder, attempt_id: str, outcome: Outcome, offsets: Sequence[int]) -> tuple[int, str]:
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
            said = _last_problem(last_words(folder.log_of(cause), offsets[cause])) if not outcome.silent else ""
            if cause in outcome.frozen:
                said = reason  # of the peer that waited: in which collective, and how long
            reason = f"rank {cause}: {_how(outcome, cause)}" + (f"; {said}" if said else "")
        if ending is not None and (outcome.silent or verdict is None):
            # A rank that refuses its start knows its verdict, and has none to write: the run is not open yet.
            verdict = outcome.exit_code if not outcome.silent and is_final(outcome.exit_code) else EXIT_FAILED
            last_step = max(ending.last_step, committed_step(folder.checkpoints))
            with contextlib.suppress(OSError):  # a full disk: the exit code still tells
                folder.amend_status(attempt_id, verdict=verdict, reason=reason, rank=cause, last_step=last_step)
        _report(folder, cause, outcome, offsets[cause])
    return (outcome.exit_code if verdict is None else verdict), reason


def last_words(log: Path, offset: int, *, most_lines: int = 200) -> str:
    """What a rank said last: its last traceback with all that led to it, or its last 20 lines.

    Args:
        offset: Where this attempt begins in the log.
    """
    with log.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().decode(errors="replace").splitlines()
    begins = [index for index, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    first = begins.pop() if begins else max(0, len(lines) - 20)
    chained = ("The above exception was the direct cause", "During handling of the above exception")
    while begins and any(line.startswith(chained) for line in lines[max(0, first - 2) : first]):
        first = begins.pop()
    return "\n".join(lines[first:][-most_lines:])


def _last_problem(words: str) -> str:
    """The last line; not that which only names the page of the docs."""
    lines = [line for line in words.splitlines() if line.strip() and not line.startswith("see docs/")]
    return lines[-1].strip().removeprefix("- ") if lines else ""


def _taken(folder: RunFolder, attempt_id: str) -> str | None:
    """Whether somebody else writes to the run: then starting again only waits again."""
    holder = read_holder(folder.lease_json)
    if holder is None or holder.attempt_id == attempt_id or holder.is_dead():
        return None
    return f"{holder} writes to this run"


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
    if rank in outcome.lost:
        return outcome.lost[rank]
    if code >= 0:
        return f"exit code {code}"
    hint = ", out of memory?" if -code == signal.SIGKILL and rank == outcome.first_failed else ""
    return f"killed by {signal.Signals(-code).name}{hint}"
