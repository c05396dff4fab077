"""A writer stops at a chosen place, is replaced, and then continues. It must change nothing in the second writer's run.

The worst places are after the first writer's last check of the lease. The second writer acts during a call of the first
writer, which sends no heartbeats meanwhile. On disk this looks as if the first process had been suspended there.
"""

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_dist.errors import CheckpointError
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.jsonl import JsonlSink, read_lines
from moe_dist.monitor.sinks.sink import GuardedSinks, LeaseWatch, SinkContext
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import Lease, LeaseError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.small_run import SmallRun
from tests.support.tiny import tiny_config

pytestmark = pytest.mark.slow


class Overtaken:
    """A run whose first writer is replaced by a second one."""

    def __init__(self, tmp_path: Path) -> None:
        self.config = tiny_config(tmp_path / "data", tmp_path / "runs")
        self.folder = RunFolder.of(self.config)
        self.first = self.second = self._open("first")

    def _open(self, attempt_id: str) -> Lease:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(Lease.__init__.__kwdefaults__, "stale_seconds", 0.6)  # pyright: ignore[reportArgumentType]
            env = RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id=attempt_id)
            return self.folder.open(self.config, env, wait_seconds=600.0)

    def overtake(self) -> None:
        """Replaces the first writer. The second writer must wait for the stale time, because the first writer's process
        is alive."""
        self.first._ended.set()  # ends the heartbeats
        self.second = self._open("second")

    def save(self, step: int, check: Callable[[], None]) -> None:
        SmallRun(self.folder.checkpoints, lease=check).train(1).save(step)

    @property
    def latest(self) -> str:
        return (self.folder.checkpoints / "latest").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Overtaken]:
    run = Overtaken(tmp_path)
    yield run
    assert run.second is not run.first, "the place was not reached"
    run.second.check()
    run.second.release()


def record(step: int, loss: float) -> Record:
    return Record(
        step=step, skipped=False, scalars={"loss/total": loss}, losses={}, labels={}, epochs={},
        balance_coefficient=0.0, ledger={}, host={}, arrays={},
    )  # fmt: skip


@pytest.mark.parametrize("checked", [False, True], ids=["before the check", "between the check and the write"])
def test_records_of_a_writer_that_wakes_up_go_nowhere(run: Overtaken, checked: bool) -> None:
    watch, sink = LeaseWatch(run.first.check), JsonlSink(SinkContext(run.folder.path))
    for step in (1, 2):
        watch.step(record(step, -1.0))
        sink.step(record(step, -1.0))
    if checked:
        watch.step(record(3, -1.0))
    run.overtake()
    second = JsonlSink(SinkContext(run.folder.path, resume_step=2))
    second.step(record(3, 1.0))
    if checked:
        sink.step(record(3, -1.0))
    for act in (lambda: watch.step(record(4, -1.0)), lambda: watch.text("a", "b")):
        with pytest.raises(LeaseError, match="lost the lease to attempt second"):
            act()
    for each in (watch, sink):
        each.flush()
        each.close()
    second.step(record(4, 1.0))
    second.close()
    lines = [(line["step"], line["scalars"]["loss/total"]) for line in read_lines(run.folder.metrics_jsonl)]
    assert lines == [(1, -1.0), (2, -1.0), (3, 1.0), (4, 1.0)]


@pytest.mark.parametrize("place", ["before the call", "in the sync"])
def test_the_verdict_of_a_writer_that_wakes_up_is_not_written(
    run: Overtaken, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The lease is checked after the new text is on disk, so a writer suspended in fsync is refused."""
    original, before = os.fsync, []

    def overtake(descriptor: int = -1) -> None:
        monkeypatch.setattr(os, "fsync", original)
        run.overtake()
        before.append(run.folder.status_json.read_bytes())

    if place == "in the sync":
        monkeypatch.setattr(os, "fsync", overtake)
    else:
        overtake()
    assert not run.folder.write_status(verdict=1, reason="woke up", last_step=9, attempt_id="first")
    assert [run.folder.status_json.read_bytes()] == before
    assert [each["attempt_id"] for each in json.loads(before[0])["attempts"]] == ["first", "second"]
    assert not list(run.folder.path.glob(".status*"))


@pytest.mark.parametrize(("place", "error"), [("in the sync", LeaseError), ("after the check", CheckpointError)])
def test_a_writer_suspended_before_replacing_latest_does_not_replace_it(
    run: Overtaken, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    """A writer that stops while it syncs the new pointer is refused by the next check. A writer suspended after this check
    later finds its pointer file gone: the second writer clears the folder before it reads `latest`."""
    run.save(10, lambda: None)
    sync, looks = os.fsync, itertools.count(1)

    def overtake() -> None:
        monkeypatch.setattr(os, "fsync", sync)
        run.overtake()
        SmallRun(run.folder.checkpoints, lease=run.second.check).manager.clear()

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("latest."):
            overtake()

    def check() -> None:
        run.first.check()
        if next(looks) == 3 and place == "after the check":
            overtake()

    if place == "in the sync":
        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(error):
        run.save(30, check)
    assert run.latest == "step_10\n"
    assert not list(run.folder.checkpoints.glob("latest.*"))


def test_a_resumed_writer_deletes_no_files_of_its_successor(run: Overtaken) -> None:
    looks, writing = itertools.count(1), run.folder.checkpoints / "step_20.0123456789ab.tmp"

    def check() -> None:
        if next(looks) == 5:
            run.overtake()
            writing.mkdir()
        run.first.check()

    with pytest.raises(LeaseError):
        run.save(10, check)
    assert writing.is_dir()
    assert run.latest == "step_10\n"


def test_a_failed_read_of_the_lease_does_not_end_its_checks() -> None:
    answers = iter([OSError(errno.EIO, "Input/output error"), LeaseError("lost")])

    def check() -> None:
        raise next(answers)

    sinks = GuardedSinks([LeaseWatch(check)])
    sinks.text("a", "b")
    with pytest.raises(LeaseError):
        sinks.text("a", "b")
