"""`python -m research.mutants reach`, then `run`; both also with `--tests clusters` and `--tests rest`; then `table`.

`reach` runs tests in a copy of the tree that has a probe at the place of each fault. `run` applies one fault after the
other to a copy. For each fault, it runs the tests that passed and that reach the fault, until a test fails. All results are
lines of JSON in the folder OUT. An interrupted `run` continues where it stopped.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.errors import ConfigError
from research.mutants.reach import ORDER, REACH_BASE, add_probes, read_durations, read_reached
from research.mutants.seeds import FILES, ROOT, Fault, load_faults

DEFAULT = "not full and not exhaustive"
# Maps names of sets of tests, in the order in which they run, to (folders, marks). CI runs the first two sets. The first
# one has the tests of `make test` and `make test-slow`.
SETS: dict[str, list[tuple[str, str]]] = {
    "test": [("tests/unit", DEFAULT), ("tests/integration tests/distributed", DEFAULT)],
    "clusters": [("tests/faults tests/browser", "not exhaustive"), ("tests/clusters", "not exhaustive")],
    "rest": [("tests/unit", "full or exhaustive"), ("tests/integration tests/distributed", "full or exhaustive")],
}
FIRST = 60  # number of tests of a fault that run first, in their own process, because they detect most faults
LIMIT_SECONDS = 3600.0  # time limit for all tests of one fault

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of results.")]
Tests = Annotated[str, typer.Option(help=f"A set of tests: {', '.join(SETS)}.")]
OUT = Path(".cache/mutants")


def copy_of_tree(out: Path, name: str) -> Path:
    """Returns the path of a git worktree of HEAD below `out`. It has the environment and the caches of this checkout."""
    tree = (out / name).absolute()
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), "HEAD"], check=True, cwd=ROOT)
        for shared in (".venv", ".cache"):
            (tree / shared).symlink_to((ROOT / shared).resolve())
    subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], check=True, cwd=tree)
    return tree


def pytest_in(tree: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Runs pytest in a copy. Returns the exit code and the output. The exit code is 1 if pytest exceeds LIMIT_SECONDS."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "research.mutants.reach", *arguments]
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        return 1, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def all_faults() -> list[Fault]:
    return [fault for path in FILES.values() for fault in load_faults(path)]


@app.command()
def reach(out: Out = OUT, tests: Tests = "test", workers: Annotated[int, typer.Option(help="pytest's -n.")] = 3) -> None:
    """Run a set of tests over a copy with probes, to learn which test reaches which fault, and how long each takes."""
    tree = copy_of_tree(out, "probed")
    add_probes(tree, all_faults())
    for number, (folders, marks) in enumerate(SETS[tests]):
        report = f"--junitxml={(out / f'durations_{tests}_{number}.xml').absolute()}"
        base = str((out / "reached" / tests).absolute())
        beside = ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"] if tests != "clusters" else []
        _, output = pytest_in(tree, "-m", marks, *beside, report, *folders.split(), **{REACH_BASE: base})
        print(output[-3000:], flush=True)


@app.command()
def run(
    out: Out = OUT,
    tests: Tests = "test",
    part: Annotated[int, typer.Option(help="With `--of N`: only every Nth fault, from this one.")] = 0,
    of: Annotated[int, typer.Option(help="Parts that run beside each other, each in a copy of its own.")] = 1,
    most: Annotated[float, typer.Option(help="Seconds of tests for a fault; survivors wait for a call without it.")] = 0.0,
) -> None:
    """Apply each fault that no earlier set of tests detected to a copy, and run the tests that reach it until one fails."""
    reached, seconds = read_reached(out / "reached" / tests), read_durations(out, tests)
    tree = copy_of_tree(out, f"broken_{part}")
    for fault in all_faults()[part::of]:
        if any(each["fault"] == fault.id and (each["killed"] or each["tests"] == tests) for each in _results(out)):
            continue
        candidates = sorted(reached.get(fault.id, set()) & seconds.keys(), key=lambda test: _order(fault, test, seconds))
        if most:
            ends = itertools.accumulate(seconds[test] for test in candidates)
            candidates = [test for test, end in zip(candidates, ends, strict=True) if end <= most]
        path, begun, killer = tree / fault.path, time.monotonic(), None
        source = path.read_text()
        path.write_text(fault.applied(source))
        for chunk in (candidates[:FIRST], candidates[FIRST:]):
            killer = killer or (_first_failed(tree, chunk) if chunk else None)
        path.write_text(source)
        if most and killer is None:
            print(fault.id, "survives", len(candidates), "tests", flush=True)
            continue
        result = {"fault": fault.id, "tests": tests, "killed": killer is not None, "by": killer}
        result |= {"candidates": len(candidates), "seconds": round(time.monotonic() - begun, 1)}
        with (out / f"results_{part}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)


def _order(fault: Fault, test: str, seconds: dict[str, float]) -> tuple[bool, bool, float]:
    """Returns a sort key. Tests of the fault's module come first, then tests of its folder, quick tests before slow."""
    path = Path(fault.path)
    return path.stem not in test, f"/{path.parent.name}/" not in test, seconds[test]


def _first_failed(tree: Path, candidates: list[str]) -> str | None:
    """Runs these tests in order until a test fails, and returns the failed test. If the tests hang, the first test counts
    as failed."""
    order = tree.with_suffix(".order")
    order.write_text("\n".join(candidates))
    files = dict.fromkeys(test.partition("::")[0] for test in candidates)
    code, output = pytest_in(tree, "-x", "-m", "", *files, **{ORDER: str(order)})
    order.unlink()
    if code == 0:
        return None
    lines = [line.partition(" ")[2] for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    failed = [test for test in candidates if any(line.startswith(test) for line in lines)]
    if failed:
        return max(failed, key=len)  # the name of one test may be a prefix of another's
    if lines or code == 1:  # the fault breaks the import, or hangs
        return candidates[0]
    raise ConfigError(f"pytest ended with {code} and no failed test of {candidates[0]}, ...: {output[-1000:]}")


def _results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("results_*.jsonl")) for line in path.read_text().splitlines()]


@app.command()
def table(out: Out = OUT) -> None:
    """Print how many faults were seeded, how many each set of tests detected, and how many minutes this took."""
    results = _results(out)
    print(f"| faults | seeded | {' | '.join(f'killed by {name}' for name in SETS)} | missed | minutes |")
    print("|---|---|" + "---|" * (len(SETS) + 2))
    for name, path in FILES.items():
        ids = {fault.id for fault in load_faults(path)}
        by = [sum(each["killed"] and each["tests"] == tests and each["fault"] in ids for each in results) for tests in SETS]
        minutes = sum(each["seconds"] for each in results if each["fault"] in ids) / 60
        print(f"| {name} | {len(ids)} | {' | '.join(map(str, by))} | {len(ids) - sum(by)} | {minutes:.0f} |")
    killed = {each["fault"] for each in results if each["killed"]}
    print("missed:", ", ".join(fault.id for fault in all_faults() if fault.id not in killed) or "none")


if __name__ == "__main__":
    app()
