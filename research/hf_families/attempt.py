"""Starts two ranks for a family, with a time limit, and finds the fewest needs with which the family works."""

import json
import os
import re
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import moe_dist.hf.ep  # noqa: F401
from moe_dist.runtime.signals import child_of
from research.hf_families import LIMITS, NEEDS, OTHERS
from research.hf_families.ranks import Difference, OneRank, compare, on_one_rank
from research.hf_families.tiny import Family

WORLD = 2


def attempt(family: Family, needs: frozenset[str], seconds: float, implementation: str = "moe_dist") -> Difference | str:
    """Returns the differences of two ranks from one, the largest of both ranks, or the first error."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        try:
            one = on_one_rank(family, needs, WORLD, folder)
        except Exception as error:  # whatever the family's code raises
            return f"on one rank: {_text(error)}"
        if one.fp32 and "fp32" not in needs:
            return f"FSDP2 takes one dtype, but the family keeps parameters in fp32: {one.fp32[0]}"
        context = get_context("fork")  # torch and transformers are imported once
        ranks = [
            context.Process(target=_rank, args=(family, one, needs, rank, port, implementation)) for rank in range(WORLD)
        ]
        for each in ranks:
            each.start()
        _wait(ranks, seconds)
        found = [_read(folder / f"rank{rank}.json") for rank in range(WORLD)]
    errors = sorted((each["when"], each["error"]) for each in found if "error" in each)
    if errors or not all(found):
        return errors[0][1] if errors else "hangs: both ranks wait"
    first, *others = [Difference(**each) for each in found]
    return replace(first, loss=max(each.loss for each in (first, *others)))


def _wait(ranks: list[Any], seconds: float) -> None:
    """Waits until all ranks have ended. Kills them if one has failed, or if all have slept for `seconds`."""
    ended = time.monotonic()
    while any(each.is_alive() for each in ranks):
        failed = any(each.exitcode for each in ranks)
        if not failed and any(_runs(each.pid) for each in ranks):
            ended = time.monotonic()
        if time.monotonic() - ended > (1.0 if failed else seconds):  # the peer of a failed rank waits for it
            for each in ranks:
                each.kill()
        ranks[0].join(0.05)
        ranks[1].join(0.05)


def _runs(process: int) -> bool:
    """Returns whether a process computes or reads a file. A rank that waits for another sleeps."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in ("R", "D")
    except OSError:
        return False


def _rank(family: Family, one: OneRank, needs: frozenset[str], rank: int, port: int, implementation: str) -> None:
    child_of(os.getppid(), ignore_stop=False)()  # no rank outlives this process
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), sys.stderr.fileno())
    result, status = one.folder / f"rank{rank}.json", 0
    try:
        result.write_text(json.dumps(asdict(compare(family, one, needs, rank, implementation))))
    except Exception as error:  # whatever the family's code raises
        result.write_text(json.dumps({"error": _text(error), "when": time.monotonic()}))
        status = 1
    os._exit(status)  # without waiting for the peer


def _text(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:300]} ({frame.filename.rpartition('site-packages/')[2]}:{frame.lineno})"


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fault_of(result: Difference | str, needs: frozenset[str]) -> str:
    """Returns why a result is no success, or an empty text."""
    if isinstance(result, str):
        return result
    limit = LIMITS["fp32" if "fp32" in needs else "fp64"]
    if not max(result.loss, result.gradient, result.step) < limit or result.saved != 0.0:
        return f"differs from one rank: {asdict(result)}"
    return ""


def judge(family: Family, seconds: float) -> dict[str, Any]:
    """Returns the record of a family: its needs and the error without each, or why it is refused and whose fault it is."""
    reasons: dict[str, str] = {}
    result = attempt(family, frozenset(), seconds)
    fault = fault_of(result, frozenset())
    while fault:
        left = sorted(NEEDS.keys() - reasons.keys(), key=lambda need: not re.search(NEEDS[need], fault))
        for need in left:
            needs = frozenset({*reasons, need})
            result = attempt(family, needs, seconds)
            after = fault_of(result, needs)
            if _place(after) != _place(fault):  # no fault, or a later one
                reasons[need], fault = fault, after
                break
        else:
            needs = frozenset(reasons)
            others = {name: fault_of(attempt(family, needs, seconds, name), needs) for name in OTHERS}
            return {"model": family.model, "refused": fault, "needs": reasons, "others": others}
    return {"model": family.model, "needs": reasons, "difference": asdict(result)}


def _place(fault: str) -> str:
    """Returns where a run failed, without numbers."""
    return re.sub(r"[\d.e+-]+", "", fault.rpartition("(")[2] or fault)
