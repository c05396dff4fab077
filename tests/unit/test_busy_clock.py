"""The busy clock measures a rank's time in a step without its waits for other ranks."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.comm.tracker import BusyClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


def test_time_inside_collectives_is_left_out(clock: Any) -> None:
    tracker: Any = SimpleNamespace(waited=7.0)
    busy = BusyClock(tracker, began=98.0)  # the step began at 98 s, when its data were read
    clock.seconds, tracker.waited = 110.0, 15.0
    assert busy.seconds(0.0) == pytest.approx(4.0)


def test_on_cuda_the_exchanges_are_left_out_where_the_host_did_not_wait(clock: Any) -> None:
    tracker: Any = SimpleNamespace(waited=0.0)
    busy = BusyClock(tracker, began=100.0)
    clock.seconds, tracker.waited = 110.0, 0.5
    assert busy.seconds(3.0) == pytest.approx(7.0)
    assert BusyClock(None, began=100.0).seconds(99.0) == 0.0
