"""Starts two ranks for a family, with a time limit, and finds the fewest needs with which the family works."""

import json
import os
import re
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import moe_dist.hf.ep  # noqa: F401
from moe_dist.errors import ConfigError
from moe_dist.runtime.signals import child_of
from research.hf_families import LIMITS, NEEDS, OTHERS
from research.hf_families.ranks import Difference, compare, on_one_rank
from research.hf_families.tiny import Family

WORLD = 2
ROOT = Path(__file__).parents[2]
BROKEN = "Connection"  # part of a rank's error message after its peer has ended
HARNESS = " [harness]"


class HarnessError(Exception):
    """This tool or the machine failed. The error says nothing about a family."""


def attempt(family: Family, needs: frozenset[str], seconds: float, implementation: str = "moe_dist") -> Difference | str:
    """Returns the differences between a run on two ranks and a run on one rank, or the first error.

    Raises:
        HarnessError: this tool or the machine failed, not the family.
    """
    family.model_class()  # ranks inherit the imported module; torch must compute nothing before the fork
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        context = get_context("fork")
        ranks = [
            context.Process(target=_rank, args=(family, folder, needs, rank, port, implementation)) for rank in range(WORLD)
        ]
        for each in ranks:
            each.start()
        hung = _wait(ranks, seconds)
        found = [_read(folder / f"rank{rank}.json") for rank in range(WORLD)]
    # A rank that loses its peer reports a broken connection, perhaps before the peer reports its error.
    errors = sorted((BROKEN in each["error"], each["when"], each["error"]) for each in found if "error" in each)
    if errors:
        if errors[0][2].endswith(HARNESS):
            raise HarnessError(errors[0][2])
        return errors[0][2]
    if hung:
        return "hangs: both ranks wait"
    if not all(found):
        raise HarnessError(f"ranks ended with {[each.exitcode for each in ranks]}, and without a result")
    first, *others = [Difference(**each) for each in found]
    return replace(first, loss=max(each.loss for each in (first, *others)))


def _wait(ranks: list[Any], seconds: float) -> bool:
    """Waits for all ranks to end. Kills them if one failed, or if all slept for `seconds`. True in the second case."""
    ended, hung = time.monotonic(), False
    while any(each.is_alive() for each in ranks):
        failed = any(each.exitcode for each in ranks)
        if not failed and any(_runs(each.pid) for each in ranks):
            ended = time.monotonic()
        if time.monotonic() - ended > (1.0 if failed else seconds):  # a failed rank's peer waits in vain
            hung = hung or not failed
            for each in ranks:
                each.kill()
        ranks[0].join(0.05)
        ranks[1].join(0.05)
    return hung


def _runs(process: int) -> bool:
    """Returns whether a process computes or reads a file. A rank that waits for another rank sleeps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("R", "D")
    except OSError:
        return False


def _rank(family: Family, folder: Path, needs: frozenset[str], rank: int, port: int, implementation: str) -> None:
    child_of(os.getppid(), ignore_stop=False)()  # ends this rank when the parent ends
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    result, status, when = folder / f"rank{rank}.json", 0, "on one rank: "
    try:
        one = on_one_rank(family, needs, WORLD, folder / f"one{rank}")  # each rank repeats this, to pass no data
        when = ""
        result.write_text(json.dumps(asdict(compare(family, one, needs, rank, implementation, folder / "saved"))))
    except Exception as error:  # the family's code may raise any error
        result.write_text(json.dumps({"error": when + _text(error), "when": time.monotonic()}))
        status = 1
    os._exit(status)  # does not wait for the peer


def _text(error: Exception) -> str:
    """Returns an error and its place. Marks torch's internal errors and errors raised by this tool as HARNESS."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    file = Path(frame.filename)
    if file.parent == Path(__file__).parent and isinstance(error, ConfigError):  # raised by `ranks`
        return text[:300]
    harness = file.parent == Path(__file__).parent or "INTERNAL ASSERT" in text
    place = frame.filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
    return f"{text[:300]} ({place}:{frame.lineno})" + (HARNESS if harness else "")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fault_of(result: Difference | str, needs: frozenset[str]) -> str:
    """Returns why a result is a failure; empty for a success."""
    if isinstance(result, str):
        return result
    limit = LIMITS["fp32" if "fp32" in needs else "fp64"]
    if not max(result.loss, result.gradient, result.step) < limit or result.saved != 0.0:
        return f"differs from one rank: {asdict(result)}"
    return ""


def judge(family: Family, seconds: float) -> dict[str, Any]:
    """Returns a family's record: its needs and the error without each need, or the error that no need ends."""
    reasons: dict[str, str] = {}
    result = attempt(family, frozenset(), seconds)
    fault = fault_of(result, frozenset())
    while fault:
        for need in _candidates(fault, reasons):
            needs = frozenset({*reasons, need})
            result = attempt(family, needs, seconds)
            after = fault_of(result, needs)
            if _place(after) != _place(fault):  # works, or fails at a later place
                reasons[need], fault = fault, after
                break
        else:
            needs = frozenset(reasons)
            others = {name: fault_of(attempt(family, needs, seconds, name), needs) for name in OTHERS}
            return {"model": family.model, "refused": fault, "needs": reasons, "others": others}
    assert not isinstance(result, str), "an error is a fault"
    return {"model": family.model, "needs": reasons, "difference": asdict(result)}


def _candidates(fault: str, reasons: Iterable[str]) -> list[str]:
    """Returns the needs to try, the likeliest first."""
    fits = {need: bool(re.search(pattern, fault)) for need, pattern in NEEDS.items() if need not in reasons}
    anywhere = () if fault.startswith("on one rank") else ("whole", "plan", "eval")
    return sorted((need for need in fits if fits[need] or need in anywhere), key=lambda need: not fits[need])


def _place(fault: str) -> str:
    """Returns the place (file) at which a run failed, without numbers."""
    return re.sub(r"[\d.e+-]+", "", fault.rpartition("(")[2] or fault)
