"""Prepares the folder of a run that fails many times, with the data, a small disk, the settings and the launcher.

python -m tests.support.site CONFIG --ends FILE --max-restarts 3      # one call of the local launcher, recorded in FILE
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launchers.command import LaunchPlan
from launchers.restart import committed_step
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import child_of
from tests.support.fault_plan import PROGRAM, build_interposer
from tests.support.tiny import tiny_dataset

ROOT = Path(__file__).parents[2]
RANKS, STEPS, SAVE_EVERY = 4, 60, 5
DISK_MIB = 32
WATCHDOG_SECONDS, MEETING_SECONDS = 30.0, 180.0  # limits for a collective and the rendezvous, for a busy machine


@dataclass
class Site:
    """The folder of a campaign: a copy of the data, a small disk for the run, and the undisturbed run to compare with.

    Attributes:
        folder: The campaign's folder, on an ordinary file system.
        disk: A small tmpfs if mounting is permitted, else None. With None an interposed system call simulates a full disk.
    """

    folder: Path
    disk: Path | None
    interposer: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def runs(self) -> Path:
        return (self.disk or self.folder) / "runs"

    def mend(self) -> None:
        """Restores the data."""
        for path in (self.folder / "pristine").iterdir():
            shutil.copy2(path, self.data / path.name)


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Creates the folder of a campaign. Removes its small disk at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pristine").exists():
        tiny_dataset(folder / "pristine")
    shutil.copytree(folder / "pristine", folder / "data", dirs_exist_ok=True)
    disk: Path | None = folder / "disk"
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", disk], capture_output=True).returncode:
        disk = None
    try:
        yield Site(folder, disk, build_interposer(folder))
    finally:
        if disk is not None:
            subprocess.run(["umount", "--lazy", disk], check=True)


def settings(name: str, *, ranks: int, **changes: Any) -> dict[str, Any]:
    """Returns the settings that all runs share."""
    values: dict[str, Any] = {
        "run.name": name,
        "train.steps": STEPS,
        "train.global_batch": 2 * ranks,
        # a skipped step would change all later steps, so the run restarts from its checkpoint instead
        "train.max_skipped_in_a_row": 1,
        "checkpoint.every": SAVE_EVERY,
        "evaluation.every": 20,
        "evaluation.balance_efficiency": False,
        "evaluation.ablate_experts": False,
        "parallel.ep": ranks,
        "parallel.timeout_seconds": MEETING_SECONDS,
        "parallel.start_seconds": MEETING_SECONDS,
        "parallel.watchdog_seconds": WATCHDOG_SECONDS,
        "monitor.sinks": [{"kind": "console", "every": 20}, {"kind": "jsonl"}],
    }
    return {**values, **{key.replace("__", "."): value for key, value in changes.items()}}


def started(config: Path, log: Path, *, max_restarts: int, variables: Mapping[str, str] | None = None) -> int:
    """Calls the local launcher once, in a process that dies with this one. Returns its verdict; `read_ends` returns how
    the attempts ended."""
    command = [sys.executable, "-m", "tests.support.site", str(config), "--ends", f"{log}.ends"]
    with log.open("ab") as stream:
        return subprocess.run(
            [*command, "--max-restarts", str(max_restarts)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
            stdout=stream,
            stderr=stream,
            preexec_fn=child_of(os.getpid(), ignore_stop=False),
        ).returncode


def read_ends(log: Path) -> list[dict[str, Any]]:
    """Returns how each attempt of a run ended, as `_launch_and_note` recorded it."""
    return [json.loads(line) for line in Path(f"{log}.ends").read_text().splitlines()]


def _launch_and_note(config: Path, ends: Path, max_restarts: int) -> int:
    """Runs the local launcher with ranks of `tests.support.injection`. For each attempt it records when the last rank
    ended, the last recorded step, whether any step was recorded, and the last committed step."""
    from launchers import local

    run = local._run

    def noted(plan: LaunchPlan, folder: RunFolder, *rest: Any) -> Any:
        before = _stamp(folder.metrics_jsonl)
        outcome = run(plan, folder, *rest)
        end = {"attempt": plan.attempt_id, "time": time.time(), "codes": outcome.codes}
        steps = [line["step"] for line in read_lines(folder.metrics_jsonl)] if folder.metrics_jsonl.exists() else []
        end |= {"step": max(steps, default=0), "committed": committed_step(folder.checkpoints)}
        end["trained"] = _stamp(folder.metrics_jsonl) != before
        with ends.open("a") as stream:
            stream.write(json.dumps(end) + "\n")
        return outcome

    local._run = noted  # pyright: ignore
    return local.launch(config, program=PROGRAM, max_restarts=max_restarts)


def _stamp(path: Path) -> tuple[int, ...]:
    """Returns a value that changes when a file is replaced or written."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return ()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--ends", type=Path, required=True)
    parser.add_argument("--max-restarts", type=int, default=0)
    options = parser.parse_args()
    sys.exit(_launch_and_note(options.config, options.ends, options.max_restarts))
