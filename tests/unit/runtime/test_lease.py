"""A lease allows one writer at a time. The tests have several holders, in one process or in several processes."""

import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_dist.errors import StoppedError
from moe_dist.runtime.lease import Holder, Lease, LeaseError, _read, read_holder
from tests.support.messages import refused
from tests.support.processes import wait_until

ROOT = Path(__file__).parents[3]


@contextmanager
def another_process(path: Path, then: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that takes the lease at `path` with a very short heartbeat interval, reports it, and runs the given
    code."""
    program = f"""
        import os, sys, time
        from pathlib import Path
        from moe_dist.runtime.lease import Lease, LeaseError
        lease = Lease(Path({str(path)!r}), "other", stale_seconds=0.6).acquire(0.0)
        print("held", flush=True)
        {then}
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def of_another_machine(path: Path) -> Holder:
    """Writes a lease whose holder is on another machine, so that its process cannot be checked."""
    holder = Holder("old", "elsewhere", 1, "another boot and namespace", "77", "token")
    path.write_bytes(b"000000000007\n" + json.dumps(asdict(holder)).encode())
    return holder


def test_a_lease_is_held_checked_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lease.json"
    lease = Lease(path, "first").acquire(0.0)
    lease.check()
    holder = read_holder(path)
    assert (holder.attempt_id, holder.is_dead()) == ("first", False)
    lease.release()
    lease.release()
    assert read_holder(path) is None
    Lease(path, "second").acquire(0.0).release()


def test_a_second_attempt_announces_its_wait_and_ends_naming_the_holder(tmp_path: Path) -> None:
    path, said = tmp_path / "lease.json", list[str]()
    with another_process(path, "time.sleep(100)") as process:
        holder = f"attempt other, process {process.pid} on "
        with pytest.raises(LeaseError, match=rf"{holder}.* did not end within 4 s"):
            Lease(path, "me", stale_seconds=3.0).acquire(4.0, on_wait=said.append)  # the heartbeat comes every 0.1 s
    (text,) = said
    assert holder in text
    assert re.search(rf", since {time.strftime('%Y-')}\d\d-\d\d \d\d:\d\d:\d\d .*; waiting up to 4 s", text)
    Lease(tmp_path / "free.json", "me").acquire(0.5, on_wait=said.append).release()
    assert said == [text], "nothing to wait for"


def test_a_stop_request_ends_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    of_another_machine(path)
    looks = iter([False, False, True])
    with refused(StoppedError):
        Lease(path, "me").acquire(1000.0, stopped=lambda: next(looks))


def test_a_claim_of_a_killed_process_does_not_block_a_takeover(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    holder = of_another_machine(path)
    claim = path.with_name(f"lease.json.{holder.token}")
    with another_process(claim, "time.sleep(100)") as process:  # a claim has the same content as a lease
        process.kill()
        wait_until(lambda: (claimer := read_holder(claim)) is not None and claimer.is_dead(), "claimer is seen as dead")
        Lease(path, "me", stale_seconds=0.2).acquire(600.0).check()
    assert [entry.name for entry in tmp_path.iterdir()] == ["lease.json"]


def test_a_holder_killed_on_this_machine_is_replaced_without_waiting_for_staleness(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    with another_process(path, "time.sleep(100)") as process:
        process.kill()
        # The process is a zombie, which also counts as dead.
        wait_until(lambda: (holder := read_holder(path)) is not None and holder.is_dead(), "holder is seen as dead")
        Lease(path, "me", stale_seconds=1000.0).acquire(0.0).check()


def test_a_silent_holder_on_another_host_is_replaced_only_when_stale(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    holder = of_another_machine(path)
    with refused(LeaseError):
        Lease(path, "me", stale_seconds=1000.0).acquire(0.3)
    assert read_holder(path) == holder
    Lease(path, "me", stale_seconds=0.3).acquire(600.0).check()


def test_a_beat_keeps_a_lease_that_is_older_than_stale(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    of_another_machine(path)
    beats = iter(range(100))

    def beat() -> None:
        with path.open("r+b") as stream:
            stream.write(b"%012d" % next(beats))

    waiting = Lease(path, "me", stale_seconds=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_dist.runtime.lease.time.sleep", lambda seconds: beat())
        clock = iter(x * 0.4 for x in range(1000))
        patch.setattr("moe_dist.runtime.lease.time.monotonic", lambda: next(clock))
        with pytest.raises(LeaseError):
            waiting.acquire(10.0)


def test_a_resumed_writer_is_refused_and_its_heartbeats_have_no_effect(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    sleeper = Lease(path, "sleeper", stale_seconds=1000.0).acquire(0.0)  # its thread sends no heartbeat during this test
    # Moves the holder to another machine, where its pid cannot be checked.
    record = path.read_bytes()
    holder = read_holder(path)
    path.write_bytes(record.replace(holder.machine.encode(), b"x" * len(holder.machine)))
    after = Lease(path, "after", stale_seconds=0.2).acquire(600.0)
    content = path.read_bytes().partition(b"\n")[2]
    sleeper.renew()
    with refused(LeaseError):
        sleeper.check()
    sleeper.release()
    after.check()
    assert path.read_bytes().partition(b"\n")[2] == content


def test_a_late_takeover_does_not_replace_a_new_holder(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    of_another_machine(path)
    stale = _read(path)
    winner = Lease(path, "winner", stale_seconds=0.2).acquire(600.0)
    assert not Lease(path, "late")._take_over(stale)
    winner.check()
    assert [entry.name for entry in tmp_path.iterdir()] == ["lease.json"]


def test_a_lease_that_somebody_removed_is_lost(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json", "me").acquire(0.0)
    lease.path.unlink()
    with refused(LeaseError):
        lease.check()
    lease.path.symlink_to("other.json")
    with pytest.raises(LeaseError, match="lost the lease"):
        lease.check()
