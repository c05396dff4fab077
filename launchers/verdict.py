"""Finds the rank at fault, the reason and the exit code of an attempt (start of the run). All launchers use this rule."""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.command import rank_ranges, ranks_of
from launchers.rank_tracker import SUDDEN, Outcome
from launchers.restart import STOPPED, committed_step, is_final
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, MoeDistError, printable
from moe_dist.runtime.cause import line_of_cause, way_on
from moe_dist.runtime.hints import warning_lines, warnings_text
from moe_dist.runtime.lease import WAIT_SECONDS
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.status import AttemptRecord

MOST_BYTES = 1 << 20  # bytes read from the end of a rank's log
LEASE_SECONDS = 5.0  # limit of the wait for rank 0, which has just ended, to release the lease


@dataclass(frozen=True)
class Verdict:
    """The end of an attempt. The next attempt avoids the node of `rank`, the rank at fault; `rank` is None if no rank
    is at fault, or if it is unknown."""

    code: int
    reason: str = ""
    rank: int | None = None


def conclude(folder: RunFolder, attempt_id: str, outcome: Outcome, *, restarts: int = 0, lasted: float = 0.0) -> Verdict:
    """Prints on standard error why an attempt failed. Writes verdict and reason into status.json, unless the rank at fault
    has recorded the cause itself. Returns the verdict. If rank 0 never opened the run folder, records `restarts`,
    the number of restarts before the attempt, and `lasted`, the attempt's seconds."""
    record = folder.read_status().of(attempt_id)
    if record is not None and record.verdict == STOPPED and outcome.failed and outcome.stop is None:
        record = None  # another rank took the SIGTERM that followed a rank's failure for a request to stop
    if record is not None and record.verdict is None:
        record = None
    told = folder.told(attempt_id)
    cause = outcome.cause(told, record)
    code, reason = outcome.exit_code(cause), "" if record is None else record.reason
    if record is not None and record.verdict == EXIT_DONE:
        for rank in outcome.failed:  # a rank that failed after the last save, for example when it closed its metrics
            _say(f"rank {rank} failed after the run was done: {_end(outcome, rank)}")
        return Verdict(EXIT_DONE, reason)
    if outcome.aborted:
        _say(f"killed; {way_on(committed_step(folder.checkpoints))}")
        return Verdict(code, reason)
    unsaved = record is None and (outcome.unready or not is_final(code))
    if outcome.stop is not None and not outcome.lost and (unsaved or (record and record.verdict == STOPPED)):
        if unsaved:
            going_on = way_on(committed_step(folder.checkpoints))
            reason = f"{outcome.stop.name} ended the ranks before they could save; {going_on}"
            _say(reason)
            write(folder, attempt_id, Verdict(STOPPED, reason), restarts=restarts, lasted=lasted)
        for rank in () if unsaved else outcome.failed:
            _say(f"the run stopped on request, but rank {rank} did not: {_end(outcome, rank)}; see {folder.log_of(rank)}")
        return Verdict(STOPPED, reason)
    if record is None and cause is None and is_final(code):
        return Verdict(code)
    verdict = _failure(folder, attempt_id, outcome, record, cause)
    if cause is not None and cause not in outcome.lost:
        _report(folder, attempt_id, outcome, cause)
    if record is None or verdict != Verdict(record.verdict or EXIT_FAILED, record.reason, record.rank):
        # A killed rank 0 has not released the lease, so `write` waits until the lease can be taken over. After the loss
        # of a node, it waits only briefly, because Slurm then soon kills this process.
        wait = WAIT_SECONDS if outcome.codes[0] < 0 and not outcome.lost else LEASE_SECONDS
        write(folder, attempt_id, verdict, restarts=restarts, lasted=lasted, wait_seconds=wait)
    return verdict


def _failure(
    folder: RunFolder, attempt_id: str, outcome: Outcome, record: AttemptRecord | None, cause: int | None
) -> Verdict:
    """Returns the verdict of a failed attempt. Keeps a recorded reason, unless its rank was only affected by `cause`."""
    killed = cause in outcome.failed and outcome.codes[cause] in SUDDEN
    if record is not None and cause in (None, record.rank) and not killed and cause not in outcome.frozen:
        reason = record.reason
        if cause is not None and outcome.hosts and not record.rank_host and not reason.startswith("rank "):
            # Another rank recorded that rank `cause` did not enter a collective, without knowing the host of `cause`.
            reason = f"rank {cause}{_where(outcome, cause)}: {reason}"
        return Verdict(EXIT_FAILED if record.verdict is None else record.verdict, reason, cause)
    code = outcome.exit_code(cause)
    if cause is None:
        return Verdict(EXIT_FAILED, f"no rank failed, but the program that started them ended with {code}")
    if cause in outcome.lost:
        ranks = [rank for rank, text in outcome.lost.items() if text == outcome.lost[cause]]
        return Verdict(EXIT_FAILED, f"{ranks_of(ranks)}: {outcome.lost[cause]}", cause)
    if cause in outcome.frozen:
        detail = "" if record is None else record.reason  # the collective that timed out on a waiting rank
    else:
        detail = _last_problem(last_output(folder.log_of(cause), attempt_id)) if outcome.codes[cause] >= 0 else ""
    reason = f"rank {cause}{_where(outcome, cause)}: {_end(outcome, cause)}" + (f"; {detail}" if detail else "")
    # A rank that fails before it opens the run folder exits with its verdict but cannot record the verdict.
    return Verdict(code if is_final(code) and outcome.codes[cause] > 0 else EXIT_FAILED, reason, cause)


def say_cause(folder: RunFolder, attempt_id: str, verdict: Verdict) -> None:
    """Prints the line of cause of a failed attempt on standard error. Call it last."""
    record = AttemptRecord(attempt_id, 0, "", 0, 0.0)  # of a run whose status.json cannot be read or written
    with contextlib.suppress(OSError, MoeDistError):
        record = folder.read_status().of(attempt_id) or record
    record = replace(record, verdict=verdict.code, reason=verdict.reason or record.reason, rank=verdict.rank)
    if line := line_of_cause(record, folder.hints(), committed_step(folder.checkpoints)):
        _say(printable(line))


def write(
    folder: RunFolder, attempt_id: str, verdict: Verdict, *, restarts: int, lasted: float = 0.0, wait_seconds: float = 0.0
) -> None:
    """Writes a verdict into status.json. Replaces a follow-up error that another rank has already written."""
    ended = {"verdict": verdict.code, "reason": verdict.reason, "rank": verdict.rank}
    step = committed_step(folder.checkpoints)
    with contextlib.suppress(OSError, MoeDistError):  # if the disk is full, only the exit code reports the failure
        more = {"last_step": step, "restarts": restarts, "lasted": lasted}
        for wait in (0.0, wait_seconds):
            if folder.amend_status(attempt_id, **ended, **more, wait_seconds=wait):
                break
            # Rank 0 holds the lease: it hangs, or died on another node. The first verdict of an attempt can be written
            # without the lease.
            if folder.write_status(**ended, attempt_id=attempt_id, last_step=max(step, folder.last_step())):
                break


def last_output(log: Path, attempt_id: str, *, most_lines: int = 200) -> str:
    """Returns an attempt's last traceback in a rank's log, with the exceptions that caused it. Without a traceback,
    returns the last 20 lines; without a log, ''."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - MOST_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    _, header, rest = text.rpartition(f"--- attempt {attempt_id}")
    lines = rest.splitlines()[1 if header else 0 :]
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


def _report(folder: RunFolder, attempt_id: str, outcome: Outcome, cause: int) -> None:
    log, ends = folder.log_of(cause), dict[str, list[int]]()
    failed = cause in (*outcome.failed, *outcome.frozen)
    what = f"failed first ({_end(outcome, cause)})" if failed else "did not enter a collective"
    lines = [f"rank {cause} {what}{_where(outcome, cause)}; {log} ends with:", "", last_output(log, attempt_id)]
    for rank in range(len(outcome.codes)):
        if rank != cause:
            ends.setdefault(_end(outcome, rank), []).append(rank)
    if ends:
        others = ", ".join(f"{rank_ranges(ranks)} ({end})" for end, ranks in ends.items())
        lines += ["", f"the other ranks ended after it: {others}"]
    if hints := folder.hints():
        lines += ["", f"the run went{warnings_text(hints)}:", *warning_lines(hints)]
    _say("\n".join(lines))


def _where(outcome: Outcome, rank: int) -> str:
    return f" on {outcome.hosts[rank]}" if outcome.hosts else ""


def _end(outcome: Outcome, rank: int) -> str:
    code = outcome.codes[rank]
    if rank in outcome.frozen:
        return "frozen by SIGSTOP, and killed after a peer's collective timed out"
    if rank in outcome.lost:
        return outcome.lost[rank]
    words = f", {outcome.words[rank]}" if rank in outcome.words else ""
    return (f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}") + words


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
