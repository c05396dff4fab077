"""Calls in a child process return values, raise the child's errors, and end at a time limit or when the child dies."""

import os
import signal
import time

import pytest

from moe_dist.config.timed import TimedCalls
from moe_dist.errors import DataError


def work(what: str, *values: int) -> object:
    if what == "pid":
        return os.getpid()
    if what == "raise":
        raise DataError(["one", "two"], see="docs/data.md")
    if what == "sleep":
        time.sleep(values[0])
    while what == "compute":
        pass
    if what == "memory":
        return len(b"a" * values[0])
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(values)


def test_calls_have_values_errors_and_an_end() -> None:
    call = TimedCalls(work, 1)
    child = call("pid")
    assert child != os.getpid()
    assert (call("sum", 2, 3), call("pid")) == (5, child)
    with pytest.raises(DataError) as raised:
        call("raise")
    assert raised.value.problems == ("one", "two")
    assert "see docs/data.md" in str(raised.value)
    assert call("pid") == child
    call("sleep", 2)  # allowed: the limit of 1 s is on CPU time, not on waiting, because a busy machine delays calls
    assert call("pid") == child
    for endless, limit in ((("sleep", 600), "more than 6 s"), (("compute",), "more than 1 s of CPU time")):
        with pytest.raises(TimeoutError, match=limit):
            call(*endless)
    assert call("pid") != child
    with pytest.raises(ChildProcessError, match="exit code -9"):
        call("die")
    assert call("sum", 2) == 2
    with pytest.raises(MemoryError):
        call("memory", 9 << 30)
    assert call("memory", 1 << 20) == 1 << 20


def test_the_child_ends_with_its_owner() -> None:
    call = TimedCalls(work, 60)
    call("pid")
    process = call._child  # pyright: ignore[reportPrivateUsage]
    del call
    process.join(600)
    assert process.exitcode == 0


def test_native_reports_of_the_child_stay_away_from_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert TimedCalls(lambda: os.write(2, b"backtrace"), 5)() == 9
    assert capfd.readouterr().err == ""
