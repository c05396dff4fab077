"""A writer is stopped, replaced and resumed. It then changes nothing in the second writer's run.

The first writer stops at a chosen place, including the worst ones: after its last check of the lease. Three tests stop a
real process with SIGSTOP. In the others the first writer is a thread that waits and sends no heartbeat. The second writer
cannot distinguish it from a stopped process, and it saves a start of Python.
"""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.jsonl import JsonlSink, read_lines
from moe_dist.monitor.sinks.sink import GuardedSinks, LeaseWatch, SinkContext
from moe_dist.runtime import lease as lease_module
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import Lease, LeaseError
from moe_dist.runtime.run_folder import RunFolder
from tests.support.cover import full
from tests.support.tiny import tiny_config, write_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
FIRST = """
import os, signal, sys
from pathlib import Path
from moe_dist.config.load import load_config
from moe_dist.runtime import lease as lease_module
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
STALE = 0.6
lease_module.Lease.__init__.__kwdefaults__["stale_seconds"] = STALE
config = load_config(sys.argv[1])
folder = RunFolder.of(config)
lease = folder.open(config, RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="sleeper"))
def sleep_now():
    print("asleep", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def state_of(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Sleeper:
    """The first writer in its own process, stopped inside `body`."""

    def __init__(self, tmp_path: Path, body: str) -> None:
        self.config = tiny_config(tmp_path / "data", tmp_path / "runs")
        self.folder = RunFolder.of(self.config)
        path = write_config(self.config, tmp_path / "x.yaml")
        self.process = subprocess.Popen(
            [sys.executable, "-c", FIRST + textwrap.dedent(body), str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "asleep\n", self.process.communicate()
        wait_until(lambda: state_of(self.process) == "T")

    def take_over(self) -> Lease:
        """Takes the lease as a second attempt does. It must wait for the stale time, because the stopped holder is
        alive."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(Lease.__init__.__kwdefaults__, "stale_seconds", 0.6)
            env = RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="second")
            return self.folder.open(self.config, env, wait_seconds=600.0)

    def wake(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGCONT)
        out, err = self.process.communicate(timeout=600)
        return self.process.returncode, out, err

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class ThreadSleeper(Sleeper):
    """The first writer as a thread of this process. `body` must not patch anything that the second writer uses."""

    def __init__(self, tmp_path: Path, body: str) -> None:
        self.config = tiny_config(tmp_path / "data", tmp_path / "runs")
        self.folder = RunFolder.of(self.config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(Lease.__init__.__kwdefaults__, "stale_seconds", 0.6)
            lease = self.folder.open(self.config, RankEnv(0, 1, 0, 1, "tcp://x", attempt=0, attempt_id="sleeper"))
        self._asleep, self._woken, self._said = threading.Event(), threading.Event(), io.StringIO()

        def sleep_now() -> None:
            lease._ended.set()  # the heartbeat stops as well
            self._asleep.set()
            assert self._woken.wait(600)

        def tell(*words: object) -> None:
            print(*words, file=self._said)

        scope = {"folder": self.folder, "lease": lease, "sleep_now": sleep_now, "print": tell, "lease_module": lease_module}
        self._code: int | None = None

        def run() -> None:
            try:
                exec(textwrap.dedent(body), scope)
                self._code = 0
            except SystemExit as ended:
                self._code = int(ended.code or 0)

        self._thread = threading.Thread(target=run, name="sleeper")
        self._thread.start()
        assert self._asleep.wait(600)

    def wake(self) -> tuple[int, str, str]:
        self._woken.set()
        self._thread.join(600)
        assert self._code is not None, "the first writer ended by an error that pytest shows as a warning"
        return self._code, self._said.getvalue(), ""

    def end(self) -> None:
        self._woken.set()


@pytest.fixture
def thread_sleeper(tmp_path: Path):
    started: list[Sleeper] = []

    def start(body: str) -> Sleeper:
        started.append(ThreadSleeper(tmp_path, body))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
def sleeper(tmp_path: Path):
    started: list[Sleeper] = []

    def start(body: str) -> Sleeper:
        started.append(Sleeper(tmp_path, body))
        return started[-1]

    yield start
    for each in started:
        each.end()


SINKS = """
    import numpy as np
    from moe_dist.monitor.sinks.jsonl import JsonlSink
    from moe_dist.monitor.sinks.sink import LeaseWatch, SinkContext
    from moe_dist.monitor.metrics import Record
    from moe_dist.runtime.lease import LeaseError
    def record(step):
        return Record(step=step, skipped=False, scalars={"loss/total": -1.0}, losses={}, labels={}, epochs={},
                      balance_coefficient=0.0, ledger={}, host={}, arrays={})
    watch, sink = LeaseWatch(lease.check), JsonlSink(SinkContext(folder.path))
"""


def record(step: int) -> Record:
    return Record(
        step=step,
        skipped=False,
        scalars={"loss/total": 1.0},
        losses={},
        labels={},
        epochs={},
        balance_coefficient=0.0,
        ledger={},
        host={},
        arrays={},
    )


@pytest.mark.parametrize("place", [full("before the look"), "between the look and the write"])
def test_records_of_a_writer_that_wakes_up_go_nowhere(
    sleeper: Callable[[str], Sleeper], thread_sleeper: Callable[[str], Sleeper], place: str
) -> None:
    body = (
        SINKS
        + f"""
    for step in (1, 2, 3):
        if step == 3 and {place!r} == "before the look": sleep_now()
        try: watch.step(record(step))
        except LeaseError as error:
            print("refused:", error); raise SystemExit(0)
        if step == 3: sleep_now()
        sink.step(record(step))
    try: watch.step(record(4))
    except LeaseError as error: print("refused:", error)
    sink.close()
    """
    )
    first = (thread_sleeper if place == "before the look" else sleeper)(body)
    lease = first.take_over()
    sink = JsonlSink(SinkContext(first.folder.path, resume_step=2))
    sink.step(record(3))
    code, out, err = first.wake()
    sink.step(record(4))
    sink.close()
    assert (code, err) == (0, "")
    assert "lost the lease to attempt second" in out
    lines = [(line["step"], line["scalars"]["loss/total"]) for line in read_lines(first.folder.metrics_jsonl)]
    assert lines == [(1, -1.0), (2, -1.0), (3, 1.0), (4, 1.0)]
    lease.check()
    lease.release()


def test_the_verdict_of_a_writer_that_wakes_up_is_not_written(thread_sleeper: Callable[[str], Sleeper]) -> None:
    first = thread_sleeper("""
    sleep_now()
    print(folder.write_status(verdict=1, reason="woke up", last_step=9, attempt_id="sleeper"))
    """)
    lease = first.take_over()
    before = first.folder.status_json.read_bytes()
    code, out, err = first.wake()
    assert (code, out, err) == (0, "False\n", "")
    assert first.folder.status_json.read_bytes() == before
    assert [each["attempt_id"] for each in json.loads(before)["attempts"]] == ["sleeper", "second"]
    lease.release()


def test_a_writer_suspended_before_renaming_its_verdict_does_not_write_it(sleeper: Callable[[str], Sleeper]) -> None:
    """The lease is checked after the new text is on disk, so a writer suspended in fsync is refused."""
    first = sleeper("""
    original = os.fsync
    def fsync(descriptor):
        original(descriptor)
        sleep_now()
    os.fsync = fsync
    print(folder.write_status(verdict=1, reason="woke up", last_step=9, attempt_id="sleeper"))
    """)
    lease = first.take_over()
    before = first.folder.status_json.read_bytes()
    assert first.wake()[:2] == (0, "False\n")
    assert first.folder.status_json.read_bytes() == before
    assert not list(first.folder.path.glob(".status*"))
    lease.release()


CHECKPOINTS = """
    import torch
    from torch import nn
    from moe_dist.checkpoint.manager import CheckpointManager
    from moe_dist.checkpoint.state import RankLayout, capture
    from moe_dist.optim.optimizer import make_optimizer
    from moe_dist.optim.optimizer import split_parameters
    from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
    placement = ExpertPlacement((ExpertGroup("text", 2, 0, 1, 4, 0, ("text",)),), ((0, 1),))
    model = nn.Linear(4, 4)
    groups = split_parameters(model, weight_decay=0.1)
    optimizer = make_optimizer(groups, backend="torch", lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    def manager_of(check):
        return CheckpointManager(folder.checkpoints, keep=2, lease_check=check)
    def save(check, step):
        manager_of(check).save(step, capture(model, optimizer, RankLayout(placement), values={}, rank_values={}))
"""


@pytest.mark.parametrize("look", [full(1), full(2), 3])
def test_a_resumed_writer_does_not_change_latest(thread_sleeper: Callable[[str], Sleeper], look: int) -> None:
    """The writer was suspended right before its lease check: before writing, before the rename of the folder, or before the
    rename of `latest`."""
    first = thread_sleeper(
        CHECKPOINTS
        + f"""
    save(lambda: None, 10)
    looks = 0
    def check():
        global looks
        looks += 1
        if looks == {look}: sleep_now()
        lease.check()
    try: save(check, 30)
    except lease_module.LeaseError as error: print("refused")
    """
    )
    lease = first.take_over()
    second = textwrap.dedent(CHECKPOINTS)
    scope: dict[str, object] = {"folder": first.folder}
    exec(second, scope)  # the same lines in this process
    save = scope["save"]
    assert callable(save)
    save(lease.check, 20)
    assert first.wake()[1] == "refused\n"
    assert (first.folder.checkpoints / "latest").read_text() == "step_20\n"
    names = {path.name for path in first.folder.checkpoints.iterdir()}
    assert {"step_10", "step_20"} <= names
    save(lease.check, 40)  # files of the suspended writer are no obstacle
    assert (first.folder.checkpoints / "latest").read_text() == "step_40\n"
    lease.release()


@pytest.mark.parametrize("place", [full("in the sync"), "after the look"])
def test_a_writer_suspended_before_replacing_latest_does_not_replace_it(
    sleeper: Callable[[str], Sleeper], thread_sleeper: Callable[[str], Sleeper], place: str
) -> None:
    """A writer suspended in the sync of the new pointer is refused by the following check. A writer suspended after this
    check finds no pointer file, because the second writer clears the folder before it reads `latest`."""
    first = (sleeper if place == "in the sync" else thread_sleeper)(
        CHECKPOINTS
        + f"""
    save(lambda: None, 10)
    import os
    sync, looks = os.fsync, 0
    def fsync(descriptor):
        sync(descriptor)
        if os.readlink(f"/proc/self/fd/{{descriptor}}").endswith(".tmp"):
            if Path(os.readlink(f"/proc/self/fd/{{descriptor}}")).name.startswith("latest."): sleep_now()
    if {place!r} == "in the sync": os.fsync = fsync
    def check():
        global looks
        looks += 1
        lease.check()
        if {place!r} == "after the look" and looks == 3: sleep_now()
    try: save(check, 30)
    except Exception as error: print(type(error).__name__)
    """
    )
    lease = first.take_over()
    scope: dict[str, object] = {"folder": first.folder}
    exec(textwrap.dedent(CHECKPOINTS), scope)
    manager_of = scope["manager_of"]
    assert callable(manager_of)
    manager_of(lease.check).clear()
    assert first.wake()[1] == {"in the sync": "LeaseError\n", "after the look": "CheckpointError\n"}[place]
    assert (first.folder.checkpoints / "latest").read_text() == "step_10\n"
    assert not list(first.folder.checkpoints.glob("latest.*"))
    lease.release()


def test_a_resumed_writer_deletes_no_files_of_its_successor(
    thread_sleeper: Callable[[str], Sleeper],
) -> None:
    first = thread_sleeper(
        CHECKPOINTS
        + """
    looks = 0
    def check():
        global looks
        looks += 1
        if looks == 5: sleep_now()
        lease.check()
    try: save(check, 10)
    except lease_module.LeaseError as error: print("refused")
    """
    )
    lease = first.take_over()
    writing = first.folder.checkpoints / "step_20.0123456789ab.tmp"
    writing.mkdir()
    assert first.wake()[1] == "refused\n"
    assert writing.is_dir()
    assert (first.folder.checkpoints / "latest").read_text() == "step_10\n"
    lease.release()


def test_the_lease_is_checked_before_every_record(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json", "me").acquire(0.0)
    tracker = LeaseWatch(lease.check)
    tracker.step(record(1))
    lease.path.unlink()
    for act in (lambda: tracker.step(record(2)), lambda: tracker.text("a", "b")):
        with pytest.raises(LeaseError):
            act()
    tracker.flush()
    tracker.close()


def test_a_failed_read_of_the_lease_does_not_end_its_checks() -> None:
    answers = iter([OSError(errno.EIO, "Input/output error"), LeaseError("lost")])

    def check() -> None:
        raise next(answers)

    sinks = GuardedSinks([LeaseWatch(check)])
    sinks.text("a", "b")
    with pytest.raises(LeaseError):
        sinks.text("a", "b")
