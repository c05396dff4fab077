"""Whole runs on two ranks start, stop by Ctrl-C on a terminal, resume, and finish."""

import contextlib
import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launchers.local import launch
from moe_dist.errors import StoppedError
from moe_dist.runtime.run_folder import RunFolder
from tests.support import slow_close
from tests.support.tiny import tiny_config, write_config

ROOT = Path(__file__).parents[2]
CTRL_C = b"\x03"
QUIET = {"evaluation.every": 1000, "evaluation.balance_efficiency": False, "evaluation.ablate_experts": False}
SINKS = [{"kind": "console"}, {"kind": "jsonl"}]
# Rank 0 gets SIGTERM at the rendezvous, before rank 1 has arrived. Rank 1 arrives after rank 0 has ended.
LATE = """
import os, signal, time
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime import rendezvous
from moe_dist.train import __main__ as rank
rendezvous.TELL_SECONDS, train = 1.0, rank.train

def late(plan, *rest):
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    while os.environ["RANK"] == "1" and not rank.RunFolder.of(plan.config).has_verdict(os.environ["MOE_DIST_ATTEMPT_ID"]):
        time.sleep(0.05)
    train(plan, *rest)

rank.train = late
run_command(rank.main)
"""


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "launchers.local", str(config), *arguments]


def launched(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


class Terminal:
    """The launcher on a pseudo-terminal, so that keys have the effect that a user sees."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self._keyboard, screen = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command(config, *arguments), cwd=ROOT, stdin=screen, stdout=screen, stderr=screen, preexec_fn=take_terminal
        )
        os.close(screen)
        self._shown: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def shown(self) -> str:
        return b"".join(self._shown).decode(errors="replace")

    def press(self, key: bytes) -> None:
        os.write(self._keyboard, key)

    def close(self) -> int:
        code = self.process.wait()
        self._reader.join()
        os.close(self._keyboard)
        return code

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux: EIO once the last process has closed the terminal
            while chunk := os.read(self._keyboard, 1 << 16):
                self._shown.append(chunk)


def lines(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    if not run.metrics_jsonl.exists():
        return []
    whole = run.metrics_jsonl.read_text().rpartition("\n")[0].splitlines()
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def wait_until(condition: Callable[[], bool], terminal: Terminal) -> None:
    while not condition():
        assert terminal.process.poll() is None, terminal.shown
        time.sleep(0.02)


def stopped(data: Path, root: Path) -> tuple[RunFolder, Path, str]:
    """Returns a run that Ctrl-C stopped on a terminal, its configuration file, and the text on the terminal."""
    sinks = [{"kind": "console", "every": 1}, {"kind": "jsonl"}, {"kind": "tensorboard"}]
    shown = {"monitor.compute_map": {"sequences": 4}, "monitor.cost_table": True, "monitor.sinks": sinks}
    settings = {**QUIET, **shown, "train.steps": 100_000, "checkpoint.every": 100_000}
    config = tiny_config(data, root / "runs", settings)
    path, run = write_config(config, root / "x.yaml"), RunFolder.of(config)
    terminal = Terminal(path)
    wait_until(lambda: len(lines(run, "step")) >= 3, terminal)
    terminal.press(CTRL_C)
    assert terminal.close() == StoppedError.exit_code, terminal.shown
    return run, path, terminal.shown


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_to_its_end(tiny_data: Path, tmp_path: Path) -> None:
    """tests/distributed/test_resume.py compares the steps of a resumed run with those of an undisturbed run."""
    run, path, shown = stopped(tiny_data, tmp_path)
    latest = run.read_status().attempts[-1]
    last_step = latest.last_step
    assert (latest.verdict, f"step_{last_step}") == (75, (run.checkpoints / "latest").read_text().strip())
    assert "\x1b[?25l" in shown  # rank 0 found the terminal, and drew the progress bar
    assert shown.endswith("\x1b[?25h")
    assert "SIGINT: saving, then stopping; Ctrl-C again ends now" in shown
    assert "Traceback" not in shown

    steps = last_step + 2
    done = launched(path, f"train.steps={steps}")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run, "step")] == list(range(1, steps + 1))
    assert [(each.verdict, each.last_step) for each in run.read_status().attempts] == [(75, last_step), (0, steps)]
    assert (run.checkpoints / "latest").read_text().strip() == f"step_{steps}"
    assert "\x1b" not in done.stdout  # without a terminal there is no progress bar
    assert "This run uses pinned placement, which sends " in done.stdout
    assert run.read_summary().strip() in done.stdout
    assert not run.lease_json.exists()

    for words in (
        "This run's experts are pinned, which sends ",
        "this run, if experts were interleaved",
        "Compute map of held-out tokens: text ",
    ):
        assert words in run.read_summary()
    assert run.compute_map_png.read_bytes().startswith(b"\x89PNG")
    means = [line["experts_by_kind_of_token"] for line in lines(run, "evaluation")]
    assert [set(mean) for mean in means] == [{"text", "drawn cells", "background"}]
    assert b"this run, if experts were interleaved" in b"".join(
        path.read_bytes() for path in run.tensorboard.glob("events*")
    )
    needed = [line["host"].get("needed_capacity_factor/text", 0.0) for line in lines(run, "step")[:last_step]]
    assert (needed[0], min(needed[1:]) >= 1.0) == (0.0, True), "told with the next step"


@pytest.mark.full  # tests/unit/parallel/test_meeting.py stops single processes
def test_a_rank_that_comes_after_rank_0_was_stopped_stops_too(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launchers.rank_tracker.LATE_SECONDS", 3.0)
    settings = {**QUIET, "run.name": "late", "parallel.start_seconds": 60.0}
    config = tiny_config(tiny_data, tmp_path / "runs", settings)
    assert launch(write_config(config, tmp_path / "x.yaml"), program=("-c", LATE), max_restarts=1) == 75
    [only] = RunFolder.of(config).read_status().attempts
    assert (only.verdict, only.rank) == (75, 0)
    said = RunFolder.of(config).log_of(1).read_text()
    assert "stopped on request while rank 1 waited for rank 0" in said


@pytest.mark.full  # waits 15 s; tests/unit/monitor/sinks/test_guarded.py tests the time limit on one rank
def test_a_sink_that_does_not_close_leaves_the_finished_run_a_success(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks wait for the sink until its time limit, because launchers kill ranks that live longer than other ranks."""
    monkeypatch.setenv(slow_close.ENDS, str(tmp_path))
    config = tiny_config(tiny_data, tmp_path / "runs", {**QUIET, "train.steps": 2, "monitor.sinks": SINKS})
    path = write_config(config, tmp_path / "x.yaml")
    assert launch(path, program=tuple(slow_close.PROGRAM.split())) == 0
    run = RunFolder.of(config)
    assert [(each.verdict, each.last_step) for each in run.read_status().attempts] == [(0, 2)]
    assert run.finished(config)
    assert "2 steps" in run.read_summary()
    assert "ConsoleSink did not close in 15 s" in run.log_of(0).read_text()
    assert slow_close.seconds_apart(tmp_path) < slow_close.BUDGET_SECONDS - 5
