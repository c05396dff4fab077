"""Checks a run with faults: it must be bit-equal to an undisturbed run, and each fault must have its expected effects."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from launchers.restart import committed_step
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from tests.support.fault_plan import PLAN, SAVING, Cell, Fault, FaultPlan
from tests.support.site import MEETING_SECONDS, ROOT, SAVE_EVERY, WATCHDOG_SECONDS

START_SECONDS = 60.0  # limit for the start of a rank until it waits for its peers, on a busy machine
END_SECONDS = 10.0  # limit from the death of a rank to the end of all ranks
SURVIVED = ("ENOSPC", "EIO", "truncated file")  # a save reports a fault of these kinds, and is tried again
TRIED_AGAIN = "training continues, the next interval tries again"
_BEGUN, _DURABLE = re.compile(r"checkpoint step_(\d+): training went on"), re.compile(r"checkpoint step_(\d+): durable")

Seen = dict[str, Any]


# --- the run


def tensors(run: RunFolder) -> dict[tuple[str, str], np.ndarray]:
    """Returns all pieces of the newest checkpoint (parameters and moments) by name and position."""
    folder = run.checkpoints / (run.checkpoints / "latest").read_text().strip()
    found: dict[tuple[str, str], np.ndarray] = {}
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, framework="np") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            found |= {(name, str(places[name])): shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def differences(run: RunFolder, undisturbed: RunFolder) -> list[str]:
    """Returns tensors and steps that are not bit-equal, and steps that are missing or repeated."""
    faults = []
    ours, theirs = tensors(run), tensors(undisturbed)
    if ours.keys() != theirs.keys():
        faults.append(f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    faults += [f"{name} differs" for name in ours.keys() & theirs.keys() if ours[name].tobytes() != theirs[name].tobytes()]
    lines, wanted = (
        [reproducible_part(line) for line in read_lines(each.metrics_jsonl) if line["kind"] != "hint"]  # depend on times
        for each in (run, undisturbed)
    )
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    if steps != list(range(1, len(steps) + 1)):
        faults.append(f"metrics.jsonl has the steps {steps}")
    if lines != wanted:
        first = next((a["step"] for a, b in zip(lines, wanted, strict=False) if a != b), len(wanted))
        faults.append(f"metrics.jsonl differs from step {first} on")
    return faults


def unverified(run: RunFolder) -> list[str]:
    """Returns the faults of the checkpoint that `latest` names, as `verify` and a read of every piece find them."""
    if not committed_step(run.checkpoints):
        return []
    try:
        odd = [name for name, piece in tensors(run).items() if not np.isfinite(piece).all()]
    except Exception as error:  # a damaged file may raise any error
        return [f"latest cannot be read: {error!r}"]
    if odd:
        return [f"not finite: {odd[:3]}"]
    command = [sys.executable, "-m", "tools.verify_checkpoint", str(run.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [done.stdout[-1000:] + done.stderr[-2000:]]


def left_over(plan: Path) -> list[int]:
    """Returns the processes that have the plan in their environment and still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"{PLAN}={plan}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


# --- its faults


def look_back(plan: FaultPlan, run: RunFolder, ends: Sequence[Mapping[str, Any]]) -> tuple[list[Seen], list[str]]:
    """Returns the effect of each fault on its attempt, and all violated requirements.

    Args:
        ends: Ends of the attempts, as `tests.support.site` records them.
    """
    attempts = list(run.read_status().attempts)
    ended = {each["attempt"]: each for each in ends}
    records = {fault.number: plan.struck(fault.number) for fault in plan.faults}
    faults, problems = [], []
    for fault in plan.faults:
        seen: Seen = {**asdict(fault)}
        faults.append(seen)
        record = records[fault.number]
        if record is None:
            problems.append(f"fault {fault} never struck")
            continue
        end = ended[record["attempt"]]
        seen |= {"redone": redone(end), "to_end": round(end["time"] - record["time"], 2)}
        at = next((n for n, each in enumerate(attempts) if each.attempt_id == record["attempt"]), None)
        if at is not None:
            ending, following = attempts[at], attempts[at + 1 :]
            seen |= {"verdict": ending.verdict, "reason": ending.reason.partition("\n")[0][:200], "named": ending.rank}
            seen["restarted"] = bool(following) and following[0].restarts > 0
        others = [each for each in plan.faults if each != fault and _strikes(records[each.number], record["attempt"])]
        if survives(fault):
            # The next save waits for this one and reports its failure, if the failure was not reported before.
            over = seen.get("verdict") == 0 or end["step"] > record["step"] + SAVE_EVERY
            seen["reported"] = TRIED_AGAIN in log_of(run, fault.rank, record["attempt"]) if over else None
            others = [each for each in others if not survives(each)]
            faulty = ["the log does not say that the next interval tries again"] if seen["reported"] is False else []
            faulty += ["a save that failed ended the attempt"] if not others and seen.get("verdict") != 0 else []
        else:
            faulty = [] if others else list(unexpected(fault, seen))
        problems += [f"{fault}: {each}; {seen}" for each in faulty]
    for end in ends:
        missed = sum(survives(each) and _strikes(records[each.number], end["attempt"]) for each in plan.faults)
        if end["trained"] and too_many_redone(end, missed, in_flight(log_of(run, 0, end["attempt"]))):
            problems.append(f"{redone(end)} steps are taken again after attempt {end['attempt']}: {end}")
    return faults, problems


def survives(fault: Fault | Cell) -> bool:
    """Returns whether the run must continue in spite of the fault."""
    return fault.phase in SAVING and fault.kind in SURVIVED


def unexpected(fault: Fault, seen: Mapping[str, Any]) -> Iterator[str]:
    """Yields the expected effects that are missing, for a fault that ended an attempt and was the only fault in it."""
    verdict, reason = seen.get("verdict"), str(seen.get("reason", ""))
    if fault.kind in ("exception", "SIGKILL") and seen["to_end"] > END_SECONDS:
        yield f"the others ended {seen['to_end']} s after it"
    # Before the rendezvous, each peer's waiting time begins with its own start.
    waited = MEETING_SECONDS + START_SECONDS if fault.phase == "import" else 1.2 * WATCHDOG_SECONDS
    if fault.kind == "SIGSTOP" and seen["to_end"] > waited + END_SECONDS:
        yield f"the others ended {seen['to_end']} s after it"
    if verdict is None:
        return  # the attempt never opened the run folder
    wanted = {"stop signals": 75, "non-finite gradient": 70, "truncated file": 65}.get(fault.kind, 1)
    if verdict != wanted:
        yield f"the verdict is not {wanted}"
    if fault.kind in ("SIGKILL", "SIGSTOP") and seen["named"] != fault.rank:
        yield "another rank is named"
    if fault.kind == "SIGKILL" and "killed by SIGKILL" not in reason:
        yield "the reason is not the kill"
    if fault.kind == "SIGSTOP" and "frozen" not in reason:
        yield "the reason is not the freeze"
    if fault.kind == "exception" and fault.phase not in SAVING and "a fault that a test injected" not in reason:
        yield "the reason is not the exception"


# --- what was lost


def redone(end: Mapping[str, Any]) -> int:
    """Returns the number of steps that the next attempt repeats."""
    return max(0, int(end["step"]) - int(end["committed"]))


def too_many_redone(end: Mapping[str, Any], missed: int, unfinished: int | None) -> bool:
    """Returns whether too many steps are lost. The limit is one interval since the last possible durable save, one more
    for each failed save, and the steps taken during an unfinished save.

    Args:
        missed: Number of the attempt's saves that failed by a fault.
        unfinished: Step of the save that was in flight when the attempt ended.
    """
    saved = int(end["step"]) if unfinished is None or unfinished <= end["committed"] else unfinished
    return saved - end["committed"] > SAVE_EVERY * (1 + missed) or end["step"] - saved > SAVE_EVERY


def in_flight(log: str) -> int | None:
    """Returns the step of the save that rank 0 had begun and not finished, by its log of an attempt, or None."""
    begun, durable = ([int(step) for step in pattern.findall(log)] for pattern in (_BEGUN, _DURABLE))
    return begun[-1] if begun and begun[-1] not in durable else None


def log_of(run: RunFolder, rank: int, attempt_id: str) -> str:
    """Returns a rank's log of one attempt."""
    text = run.log_of(rank).read_text(errors="replace")
    return text.partition(f"--- attempt {attempt_id},")[2].partition("\n--- attempt ")[0]


def _strikes(record: Mapping[str, Any] | None, attempt_id: str) -> bool:
    return record is not None and record["attempt"] == attempt_id
