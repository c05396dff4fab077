"""The state of runs is read from their folders."""

import io
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launchers import run_progress
from launchers.run_progress import RunState, read_progress
from launchers.status import find_runs, main, many_runs, one_run
from moe_dist.errors import ConfigError
from moe_dist.runtime.lease import Holder, Lease
from moe_dist.runtime.status import AttemptRecord, record_save_seconds, write_status
from tests.support.invoked import invoke
from tests.support.messages import refused

NOW = 1_800_000_000.0


class Folder:
    """A run folder that a test fills."""

    def __init__(self, root: Path, name: str = "night", steps: int = 100) -> None:
        self.path = root / name
        (self.path / "log").mkdir(parents=True)
        (self.path / "config.yaml").write_text(f"train: {{steps: {steps}}}\n")

    def attempt(self, number: int, verdict: int | None, reason: str = "", step: int = 0) -> "Folder":
        ended = NOW - 100 if verdict is not None else None
        ending = AttemptRecord(f"a{number}", number, "node1", 1, NOW - 1000, ended, verdict, reason, 2, step, "node5")
        write_status(self.path / "status.json", ending)
        return self

    def records(self, *rates: float) -> "Folder":
        with (self.path / "metrics.jsonl").open("a") as file:
            for rate in rates:
                step = sum(1 for _ in (self.path / "metrics.jsonl").open()) + 1
                scalars = {"perf/tokens_per_second": rate, "perf/step_seconds": 0.5, "loss/total": 2.25}
                line = {"step": step, "kind": "step", "time": NOW, "scalars": scalars, "arrays": [0] * 30_000}
                file.write(json.dumps(line, separators=(",", ":")) + "\n")
                file.flush()
        return self

    def checkpoint(self, step: int) -> "Folder":
        (self.path / "checkpoints").mkdir()
        (self.path / "checkpoints" / "latest").write_text(f"step_{step}\n")
        return self


def text(renderable: Any, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_a_running_run(tmp_path: Path) -> None:
    folder = Folder(tmp_path).attempt(0, None).records(100.0, 1000.0, 5000.0).checkpoint(2)
    record_save_seconds(folder.path / "log", 1.5)
    lease = Lease(folder.path / "lease.json", "a0").acquire(0.0)
    try:
        run = read_progress(folder.path)
    finally:
        lease.release()
    assert run.state is RunState.RUNNING
    assert (run.step, run.total_steps, run.tokens_per_second, run.remaining_seconds) == (3, 100, 1000.0, 48.5)
    assert (run.checkpoint_step, run.save_seconds, run.losses) == (2, 1.5, {"total": 2.25})
    shown = text(one_run(run))
    for words in ("night  running", "3/100", "1.0k tokens/s, 0.5 s a step, 48 s left", "total 2.250", "took 1.5 s at most"):
        assert words in shown


@pytest.mark.parametrize(
    ("verdict", "state"),
    [
        (0, RunState.DONE), (75, RunState.STOPPED), (78, RunState.REFUSED), (69, RunState.REFUSED),
        (65, RunState.REFUSED), (70, RunState.DIVERGED), (1, RunState.FAILED), (None, RunState.DIED),
    ],
)  # fmt: skip
def test_how_the_latest_attempt_ended(verdict: int | None, state: RunState, tmp_path: Path) -> None:
    assert read_progress(Folder(tmp_path).attempt(0, 1).attempt(1, verdict).path).state is state


def test_a_writer_that_is_silent_and_one_that_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_progress, "BEAT_SECONDS", 0.3)
    folder = Folder(tmp_path).attempt(0, None)
    me = Holder.this_process("a0")
    elsewhere = {**me.__dict__, "machine": "another", "host": "node7"}
    (folder.path / "lease.json").write_text(f"0\n{json.dumps(elsewhere)}\n")
    assert read_progress(folder.path).state is RunState.RUNNING
    later = read_progress(folder.path, now=time.time() + 600)
    assert later.state is RunState.SILENT
    assert "process" in text(one_run(later))
    assert "on node7, last heartbeat 10 min ago" in text(one_run(later))
    (folder.path / "lease.json").write_text(f"0\n{json.dumps({**me.__dict__, 'pid': 2**22 - 1})}\n")
    assert read_progress(folder.path).state is RunState.DIED
    (folder.path / "lease.json").write_text(f"0\n{json.dumps(elsewhere)}\n")
    folder.attempt(0, 1)
    assert read_progress(folder.path).state is RunState.FAILED, "rank 0 was killed, and its launcher recorded the end"


def test_a_skewed_clock_of_the_viewer_changes_neither_state_nor_ages(tmp_path: Path) -> None:
    folder = Folder(tmp_path).attempt(0, None).records(1.0)
    lease = Lease(folder.path / "lease.json", "a0", stale_seconds=0.6).acquire(0.0)
    record = json.loads((folder.path / "lease.json").read_bytes().partition(b"\n")[2])
    try:
        with (folder.path / "lease.json").open("r+") as file:  # held on another host
            file.write(f"{0:012d}\n{json.dumps({**record, 'machine': 'another'})}\n")
            file.truncate()
        run = read_progress(folder.path, now=time.time() + 7200.0)
    finally:
        lease._ended.set()
    assert run.state is RunState.RUNNING
    assert run.record_age < 600.0
    shown = AttemptRecord("a1", 1, "node1", 1, NOW, NOW - 7200.0, 1, "recorded by an older version", 2, 0)
    write_status(folder.path / "status.json", shown)
    assert "2 h" not in text(one_run(read_progress(folder.path)))


def test_restarts_are_shown_with_their_reasons(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for number in range(10):
        folder.attempt(number, 1, f"reason {number}\nmore", step=number)
    folder.attempt(10, 75, "stopped on request after step 11", step=11)
    shown = text(one_run(read_progress(folder.path)))
    assert "3 earlier" in shown
    assert "reason 2" not in shown
    assert "failed (1)           rank 2 on node5: reason 9" in shown
    assert "stopped, saved (75)  stopped on request after step 11" in shown
    assert "more" not in shown
    assert "no checkpoint was saved, so the same command begins at step 1" in shown


def test_a_damaged_status_is_reported_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path).records(100.0)
    (folder.path / "status.json").write_text("{")
    (folder.path / "config.yaml").write_text(": : :")
    run = read_progress(folder.path)
    assert (run.state, run.step, run.total_steps) == (RunState.UNREADABLE, 1, None)
    assert "status.json: damaged" in text(one_run(run)).replace("\n", "")


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("RuntimeError: [/pytorch/x.cc:1] closed", "RuntimeError: [/pytorch/x.cc:1] closed"),
        ("[bold]a[/bold] :smile:", "[bold]a[/bold] :smile:"),
        ("\x1b[2J\x1b]0;title\x07 \r\u202e", r"\x1b[2J\x1b]0;title\x07 \r\u202e"),
        ("\udc80 \ud800", r"\udc80 \ud800"),
    ],
)
def test_what_another_user_wrote_is_shown_as_plain_text(tmp_path: Path, reason: str, shown: str) -> None:
    folder = Folder(tmp_path, reason.replace("/", "_").encode(errors="surrogatepass").decode(errors="replace") + "x")
    folder.attempt(0, 1, reason)
    holder = {"attempt_id": "a", "host": reason, "pid": 1, "machine": "", "born": "", "token": ""}
    (folder.path / "lease.json").write_text(f"{0:012d}\n{json.dumps(holder)}\n")
    run = read_progress(folder.path)
    for renderable in (many_runs([run], width=300), one_run(run)):
        printed = text(renderable, width=300)
        assert shown in printed
        assert all(character.isprintable() or character == "\n" for character in printed)
        printed.encode()
    assert f"on {shown}" in text(one_run(run), width=300)


@pytest.mark.parametrize(
    "line",
    [
        '{"step":1,"kind":"step","scalars":null}',
        '{"step":1,"kind":"step"}',
        '{"step":"x","kind":"step","scalars":{}}',
        '{"step":1,"kind":"step","scalars":{"perf/step_seconds":Infinity,"loss/total":"x"}}',
        '["step",1,"kind":"step"]',
        '{"step":9,"kind":"evaluation","scalars":{"perf/tokens_per_second":7.0}}',
    ],
)
@pytest.mark.parametrize("end", ["\n", '\n{"step":9,"kind":"step"'], ids=["whole", "torn"])
def test_a_line_that_is_no_step_is_left_out(tmp_path: Path, line: str, end: str) -> None:
    folder = Folder(tmp_path).records(10.0)
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(line + end)
    run = read_progress(folder.path)
    assert (run.step, run.tokens_per_second) == (1, 10.0)
    text(many_runs([run]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 10**4000) for key in ("last_step", "pid", "restarts", "verdict")),
        *(("started", date) for date in (1e20, -1.0, math.nan, math.inf)),
    ],
    ids=lambda each: str(each)[:9],
)
def test_a_number_that_cannot_be_shown_is_damage_and_hides_no_other_run(tmp_path: Path, key: str, value: float) -> None:
    folder = Folder(tmp_path, "hostile").attempt(0, 1, "r", step=100)
    Folder(tmp_path, "sound").attempt(0, 0, "done", step=100)
    path = folder.path / "status.json"
    records = json.loads(path.read_text())
    records["attempts"][-1][key] = value
    path.write_text(json.dumps(records))
    (folder.path / "config.yaml").write_text(f"train: {{steps: {10**4000}}}\n")
    (folder.path / "log").mkdir(exist_ok=True)
    (folder.path / "log" / "save_seconds.json").write_text(f"[1e999, -5, {10**400}]")
    runs = [read_progress(found) for found in sorted(find_runs([], tmp_path))]
    assert [run.state for run in runs] == [RunState.UNREADABLE, RunState.DONE]
    assert "sound" in text(many_runs(runs))
    text(one_run(runs[0]))


def test_several_runs_are_a_table_as_wide_as_the_terminal(tmp_path: Path) -> None:
    Folder(tmp_path, "a-night").attempt(0, 1, "a reason that goes on and on " * 9).records(1e6)
    Folder(tmp_path, "new")
    Folder(tmp_path / "sweep", "3").attempt(0, 0, "done", step=100)
    runs = [read_progress(path) for path in sorted(find_runs([], tmp_path))]
    for width in (80, 120):
        lines = text(many_runs(runs, width=width), width=width).splitlines()
        assert [line.split()[0] for line in lines] == ["run", "a-night", "new", "sweep/3"]
        assert max(map(len, lines)) <= width
    assert lines[1].split()[1:5] == ["failed", "1/100", "-", "1"]
    assert "not begun" in lines[2]


def test_runs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    night, other = Folder(tmp_path).path, Folder(tmp_path / "x", "other").path
    assert find_runs(["night", str(other)], tmp_path) == [night, other]
    assert find_runs(["x"], tmp_path) == [other], "the tasks of an array"
    with refused(ConfigError):
        find_runs(["nigth"], tmp_path)
    with refused(ConfigError):
        find_runs([], tmp_path / "empty")


def test_the_snapshot_of_a_job_is_no_run(tmp_path: Path) -> None:
    night = Folder(tmp_path / "runs").path
    snapshot = night / "slurm" / "20261201T100000-ab12cd"
    (snapshot / "code").mkdir(parents=True)
    (snapshot / "config.yaml").write_text("train: {steps: 1}\n")
    assert find_runs([], tmp_path / "runs") == [night]
    for root in (night, night / "slurm"):
        with refused(ConfigError, golden=False):
            find_runs([], root)


def test_the_command_changes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path).attempt(0, 75, "stopped").records(10.0)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.path.rglob("*"))}
    for arguments in ([], ["night"]):
        assert "stopped" in invoke(main, *arguments, f"--root={tmp_path}", code=0).output
    invoke(main, "none", f"--root={tmp_path}", code=78)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.path.rglob("*"))} == before
