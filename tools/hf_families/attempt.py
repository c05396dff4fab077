"""Starts two ranks for a family, with a time limit, and finds the fewest needs with which the family works."""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tools.hf_families.ranks import LIMITS, NEEDS, Difference, compare
from tools.hf_families.tiny import Family

WORLD = 2


def attempt(family: Family, needs: frozenset[str], seconds: float, implementation: str = "moe_dist") -> Difference | str:
    """Returns the differences of two ranks from one, the largest of both ranks, or the first error."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), _free_port()
        context = get_context("fork")  # torch and transformers are imported once
        ranks = [
            context.Process(target=_rank, args=(family, needs, rank, port, folder, implementation)) for rank in range(WORLD)
        ]
        for each in ranks:
            each.start()
        _wait(ranks, seconds)
        found = [_read(folder / f"rank{rank}.json") for rank in range(WORLD)]
    errors = sorted((each["when"], each["error"]) for each in found if "error" in each)
    if errors or not all(found):
        return errors[0][1] if errors else f"no answer within {seconds:.0f} s"
    return max((Difference(**each) for each in found), key=lambda each: each.gradient)


def _wait(ranks: list[Any], seconds: float) -> None:
    """Waits until all ranks have ended. Kills the others if one fails or the time is over."""
    end = time.monotonic() + seconds
    while any(each.is_alive() for each in ranks):
        if any(each.exitcode for each in ranks):
            end = min(end, time.monotonic() + 1.0)  # the peer of a failed rank waits for it
        if time.monotonic() > end:
            for each in ranks:
                each.kill()
        for each in ranks:
            each.join(0.05)


def _rank(family: Family, needs: frozenset[str], rank: int, port: int, folder: Path, implementation: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), sys.stderr.fileno())
    result, status = folder / f"rank{rank}.json", 0
    try:
        result.write_text(json.dumps(asdict(compare(family, needs, rank, WORLD, folder, implementation))))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"
        text = " ".join(f"{type(error).__name__}: {error}".split())
        result.write_text(json.dumps({"error": f"{text[:300]} ({place})", "when": time.monotonic()}))
        status = 1
    os._exit(status)  # without waiting for the peer


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
    limit = LIMITS[torch.float32 if "fp32" in needs else torch.float64]
    if not max(result.loss, result.gradient, result.step) < limit or result.saved != 0.0:
        return f"differs from one rank: {asdict(result)}"
    return ""


def judge(family: Family, seconds: float) -> dict[str, Any]:
    """Returns the record of a family: its fewest needs and why it has each, or why it is refused and whose fault it is."""
    multimodal = "pixel" in family.name
    del multimodal
    none: frozenset[str] = frozenset()
    result = attempt(family, none, seconds)
    if not (first := fault_of(result, none)):
        return {"needs": {}, "difference": asdict(result)}
    needs = frozenset(NEEDS)
    if reason := fault_of(attempt(family, needs, seconds), needs):
        whose = {name: fault_of(attempt(family, needs, seconds, name), needs) for name in ("", "all_to_all")}
        return {"refused": reason, "first": first, "FSDP2 alone": whose[""], "all_to_all": whose["all_to_all"]}
    reasons = {}
    for each in NEEDS:
        if reason := fault_of(attempt(family, needs - {each}, seconds), needs - {each}):
            reasons[each] = reason
        else:
            needs -= {each}
    result = attempt(family, needs, seconds)
    return {"needs": reasons, "difference": asdict(result), "first": first}
