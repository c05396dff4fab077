"""Runs the checks in order within a time limit, writes the results after each check, and continues an interrupted run."""

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moe_dist
from moe_dist.runtime.files import write_atomically
from tools.gpu_check.outcome import CheckJob, Outcome
from tools.gpu_check.process import GRACE, run_check

PACKAGES = ("torch", "triton", "numpy", "megatron-core")


@dataclass(frozen=True)
class Check:
    """One line of the table of checks.

    Attributes:
        target: Function 'module:name' that takes a `CheckJob` and returns the check's readings.
        seconds: Time limit, several times the check's expected time on a GPU.
    """

    target: str
    seconds: float
    says: str


def header(job: CheckJob, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the facts that all results in one file share: the card's facts in `found`, the hash of the code, the
    machine and the versions of packages."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    settings = {"gpus": job.gpus, "rehearse": job.rehearse, "code": code_hash(), "python": platform.python_version()}
    return {**found, **settings, **versions}


def code_hash() -> str:
    """Returns a hash of the source of moe_dist, of tools and, in a clone or bundle, of research/gpu_bench, because a copied
    source folder may have no git repository."""
    made = sha256()
    product, tools = Path(moe_dist.__file__).parent, Path(__file__).parents[1]
    for top in (product, tools, tools.with_name("research") / "gpu_bench"):
        for file in sorted(top.rglob("*.py")):
            made.update(str(file.relative_to(top)).encode() + file.read_bytes())
    return made.hexdigest()[:16]


def run_checks(
    checks: Mapping[str, Check],
    job: CheckJob,
    path: Path,
    found: Mapping[str, Any],
    *,
    minutes: float,
    fresh: bool = False,
    show: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> dict[str, Outcome]:
    """Runs each check that has no result in the file `path`, and returns all outcomes. Ignores results with another
    header (code, machine, versions). A check for which no time is left gets the verdict `not run`; a later call runs it."""
    head, end = header(job, found), time.monotonic() + 60 * minutes
    outcomes = {} if fresh else read_outcomes(path, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, check in checks.items():
        if name not in outcomes:
            outcome = Outcome("not run", f"the time of {minutes:g} minutes is over; the same command goes on")
            if (left := end - time.monotonic()) > 0:
                readings = [each for outcome in outcomes.values() for each in outcome.readings]
                rates = {each.what: each.value for each in readings if each.unit in ("B/s", "FLOP/s")}
                made = run_check(name, check.target, replace(job, rates=rates, seconds=min(check.seconds, left)))
                # ranks end `GRACE` before the check's limit, or a second after their start: a late failure may be a timeout
                if made.verdict != "fail" or time.monotonic() < end - 2 * GRACE:
                    outcome = made
            outcomes[name] = outcome
            known = {key: each.as_json() for key, each in outcomes.items() if each.verdict != "not run"}
            write_atomically(path, json.dumps({"header": head, "checks": known}, indent=1) + "\n")
        show(name, outcomes[name])
    return {name: outcomes[name] for name in checks}


def read_outcomes(path: Path, head: Mapping[str, Any]) -> dict[str, Outcome]:
    """Returns the results by check if an interrupted run with the same header wrote them; empty otherwise."""
    try:
        read = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    if read.get("header") != head:
        return {}
    return {name: Outcome.from_json(each) for name, each in read["checks"].items()}
