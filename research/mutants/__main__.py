"""`python -m research.mutants reach`, then `run --tests ci`, `run --tests all` and `table`.

`reach` runs all tests once over a copy with probes. `run` breaks a copy by one fault after the other and runs the tests
that reach the fault, the quickest first, until one fails. All results are lines of JSON below OUT; an interrupted command
goes on where it stopped.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.runtime.command_line import run_command
from research.mutants.reach import add_probes, read_reached
from research.mutants.seeds import FILES, ROOT, Fault, load_faults

PARTS = ("tests/unit", "tests/integration tests/distributed", "tests/clusters", "tests/faults", "tests/browser")
SELECTED = {"ci": "not exhaustive", "all": ""}
LIMIT_SECONDS = 3600.0  # of all tests of one fault

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Out = Annotated[Path, typer.Option(help="Folder of results.")]
OUT = Path(".cache/mutants")


def copy_of_tree(out: Path, name: str) -> Path:
    """Returns a git worktree of HEAD below `out`, with this checkout's environment and caches."""
    tree = (out / name).absolute()
    if not tree.exists():
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), "HEAD"], check=True, cwd=ROOT)
        for shared in (".venv", ".cache"):
            (tree / shared).symlink_to((ROOT / shared).resolve())
    subprocess.run(["git", "checkout", "--quiet", "--force", "HEAD"], check=True, cwd=tree)
    return tree


def pytest_in(tree: Path, *arguments: str, seconds: float | None = None, **variables: str) -> int:
    """Runs pytest in a copy and returns its exit code; a run that passes `seconds` counts as a failed test."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        return subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return 1


def all_faults() -> list[Fault]:
    return [fault for path in FILES.values() if path.exists() for fault in load_faults(path)]


@app.command()
def reach(out: Out = OUT, parts: Annotated[str, typer.Option(help="Folders of tests; default: all.")] = "") -> None:
    """Run all tests over a copy with probes, to learn which test reaches which fault."""
    tree = copy_of_tree(out, "probed")
    add_probes(tree, all_faults())
    for part in [parts] if parts else PARTS:
        report = (out / f"durations_{part.replace('/', '_').replace(' ', '_')}.xml").absolute()
        base = str((out / "reached").absolute())
        pytest_in(
            tree, "-m", "", "-p", "research.mutants.reach", f"--junitxml={report}", *part.split(), MUTANTS_REACH_BASE=base
        )


@app.command()
def run(
    out: Out = OUT,
    tests: Annotated[str, typer.Option(help="ci: CI's tests; all: the others, for faults that CI's tests miss.")] = "ci",
    only: Annotated[str, typer.Option(help="One fault.")] = "",
) -> None:
    """Break a copy by each fault, and run the tests that reach the fault until one fails."""
    done = {(each["fault"], each["tests"]): each["killed"] for each in _lines(out / "results.jsonl")}
    reached, chosen = read_reached(out / "reached"), _selected(out, SELECTED["ci"])
    tree = copy_of_tree(out, "broken")
    for fault in all_faults():
        if (only and fault.id != only) or (fault.id, tests) in done or (tests == "all" and done.get((fault.id, "ci"))):
            continue
        candidates = sorted(test for test in reached.get(fault.id, ()) if (test in chosen) == (tests == "ci"))
        path = tree / fault.path
        source = path.read_text()
        path.write_text(fault.applied(source))
        begun = time.monotonic()
        code = pytest_in(tree, "-x", "-m", "", *candidates, seconds=LIMIT_SECONDS) if candidates else 0
        path.write_text(source)
        result = {"fault": fault.id, "tests": tests, "killed": code != 0, "candidates": len(candidates)}
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps({**result, "seconds": round(time.monotonic() - begun, 1)}) + "\n")
        print(result, flush=True)


def _selected(out: Path, marks: str) -> set[str]:
    """Returns the names of the tests that `-m marks` selects."""
    tree = copy_of_tree(out, "broken")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", marks, *" ".join(PARTS).split()]
    lines = subprocess.run(command, cwd=tree, capture_output=True, text=True).stdout.splitlines()
    return {line for line in lines if "::" in line}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@app.command()
def table(out: Out = OUT) -> None:
    """Print the table of faults: seeded, killed by CI's tests, killed by all tests."""
    killed = {(each["fault"], each["tests"]) for each in _lines(out / "results.jsonl") if each["killed"]}
    print("| faults | seeded | killed by CI's tests | killed by all tests |\n|---|---|---|---|")
    for name, path in FILES.items():
        faults = load_faults(path) if path.exists() else []
        by_ci = sum((fault.id, "ci") in killed for fault in faults)
        by_all = sum(bool({(fault.id, "ci"), (fault.id, "all")} & killed) for fault in faults)
        print(f"| {name} | {len(faults)} | {by_ci} | {by_all} |")


if __name__ == "__main__":
    run_command(app)
