"""Composes the line of cause, with which every failed run ends: in its launcher's output, in `status` and in the report.

The line tells what happened, on which rank, in which layer and modality, since which step, and what to do, in this order.
It alone says from where a run goes on, so that no two sentences can contradict each other.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from moe_dist.errors import EXIT_DONE, ConfigError, DataError, DivergedError, ResourceError, StoppedError
from moe_dist.runtime.hints import RecordedHint
from moe_dist.runtime.status import AttemptRecord

REPEATS = (ConfigError.exit_code, DataError.exit_code, ResourceError.exit_code)  # an unchanged restart would fail again
LONGEST_PART = 400  # characters
_RANK = re.compile(r"^(ranks? [\d, -]+(?: on [^:\s]+)?): ")
_OTHER_RANKS = re.compile(r"\branks? \d[\d, -]*(?=,| did not enter)|differ on (ranks? \d[\d, -]*)")
_LAYER = re.compile(r"\blayers?[ .](\d+)")
_STEPS = re.compile(r"\b(?:up to|at|after|of) step (\d{1,18})")


class Kind(NamedTuple):
    """A kind of failure, found by its exit code or by words of the recorded reason.

    Attributes:
        advice: What to do. If it is empty, the reason itself says it after its first semicolon.
        hints: Kinds of hints that tell more about the failure.
    """

    name: str
    code: int | None
    words: str
    advice: str = ""
    hints: tuple[str, ...] = ()


KINDS = (
    Kind("wrong configuration", ConfigError.exit_code, ""),
    Kind("nodes or GPUs that do not fit", ResourceError.exit_code, ""),
    Kind("bad data", DataError.exit_code, ""),
    Kind("diverged", DivergedError.exit_code, "", hints=("skipped", "logits", "gradient", "router", "update", "spike")),
    Kind("copies of weights differ", None, r"IntegrityError|the copies of .* differ on"),
    Kind(
        "out of memory",
        None,
        r"out of memory|OutOfMemory|oom_kill|OOM Killed|memory limit",
        "lower train.micro_batch, set parallel.recompute, or take more ranks (moe-dist plan shows what fits)",
        ("memory",),
    ),
    Kind("storage", None, r"repair th|are free;"),
    Kind(
        "not stopped in time",
        None,
        "did not stop within the grace",
        "give it more time (--grace, or signal_seconds of the cluster file)",
    ),
    Kind(
        "hang",
        None,
        r"collective .*did not finish|frozen by SIGSTOP|watchdog",
        "look at the machine of the rank that others wait for (suspended, dead, slow disk), or at the network if no rank "
        "is named; raise parallel.timeout_seconds only if a step may take so long",
        ("slow",),
    ),
    Kind("lost node", None, r"[Nn]ode failure|lost with its node|Ray worker", "look at that node, or leave it out"),
    Kind(
        "killed",
        None,
        r"killed by SIG(KILL|TERM)",
        "look for who killed the process: the kernel's out-of-memory killer (dmesg), a limit of the scheduler, a person",
    ),
    Kind("crash of native code", None, r"killed by SIG", "look at the end of that rank's log, and test its hardware"),
    Kind("lost connection", None, r"lost a peer", "look at the end of every rank's log, and at the network"),
    Kind("failed", None, "", "look at the traceback in that rank's log"),
)


def way_on(committed: int) -> str:
    """Returns where the same command goes on. `committed` is the step of the newest checkpoint, 0 without a checkpoint."""
    if not committed:
        return "no checkpoint was saved, so the same command begins at step 1"
    return f"the same command resumes from the checkpoint of step {committed}"


def line_of_cause(record: AttemptRecord, hints: Sequence[RecordedHint], committed: int) -> str:
    """Returns the line for a failed attempt; empty for an attempt that is done, stopped on request, or has not ended."""
    if record.verdict in (None, EXIT_DONE, StoppedError.exit_code):
        return ""
    reason = " ".join(record.reason[: 10 * LONGEST_PART].split())  # time of the searches is quadratic in its length
    kind = next(k for k in KINDS if k.code == record.verdict or (k.code is None and re.search(k.words, reason)))
    named = _RANK.match(reason)
    reason = reason[named.end() :] if named else reason
    what, _, rest = reason.partition("; ")
    told = sorted(hint for hint in hints if hint.kind.partition("/")[0] in kind.hints)
    texts = [reason, *(hint.text for hint in told)]
    parts = [
        f"{kind.name}: {what[:LONGEST_PART] or 'no reason was recorded'}",
        named[1] if named else _rank(record, reason, kind),
        next((f"layer {found[1]}" for text in texts if (found := _LAYER.search(text))), ""),
        next((name for hint in told if (name := hint.kind.partition("/")[2])), ""),
        _since(record, what, told),
    ]
    advice = kind.advice or rest[: 2 * LONGEST_PART] or "follow the message above"
    if "the same command" not in advice:
        again = "an unchanged restart would fail again; after the change " if record.verdict in REPEATS else ""
        advice = f"{advice}; {again}{way_on(committed)}"
    return f"cause: {', '.join(filter(None, parts))}; to do: {advice}"


def _rank(record: AttemptRecord, reason: str, kind: Kind) -> str:
    if kind.code == DivergedError.exit_code:  # all ranks skip the same steps
        return "all ranks"
    if record.rank is not None:
        return f"rank {record.rank}" + (f" on {record.rank_host}" if record.rank_host else "")
    found = _OTHER_RANKS.search(reason)
    return (found[1] or found[0]).strip(" ,") if found else "no rank is known"


def _since(record: AttemptRecord, what: str, told: Sequence[RecordedHint]) -> str:
    """Returns the step that the reason names, or an earlier step with a hint about this failure."""
    found = _STEPS.search(what)
    steps = [int(found[1])] if found else []
    steps += [hint.step for hint in told if hint.step <= (record.last_step or hint.step)]
    if steps:
        return f"since step {min(steps)}"
    return f"after step {record.last_step}" if record.last_step else "before the first step"
