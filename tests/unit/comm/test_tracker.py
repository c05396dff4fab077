"""The tracker knows when a rank enters and leaves a collective, also if the collective runs on a device, or if it
contains untracked collectives."""

import itertools
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_dist.comm import tracker as watch_file
from moe_dist.comm.collectives import start_sum, sum_over
from moe_dist.comm.tracker import CollectiveTracker, track_collective

CPU = torch.device("cpu")


def test_a_rank_is_in_a_collective_until_it_leaves_it() -> None:
    tracker = CollectiveTracker()
    assert tracker.oldest() is None
    with tracker.inside("rows", device=CPU, layer="layers.3", send=[0, 5], receive=[0, 7]):
        position = tracker.oldest()
        assert (position.collective, position.layer, position.entered) == ("rows", "layers.3", 1)
        assert (position.send, position.receive) == ((0, 5), (0, 7))
    assert tracker.oldest() is None
    assert tracker.entered == 1


def test_a_sum_in_flight_is_named_at_its_start_and_at_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, seen = CollectiveTracker(), []

    def look() -> None:
        position = tracker.oldest()
        seen.append(position and (position.collective, position.entered))

    def all_reduce(tensor: torch.Tensor, *, async_op: bool, **_: object) -> SimpleNamespace:
        assert async_op
        look()
        return SimpleNamespace(wait=lambda: (look(), tensor.mul_(2)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    group: Any = object()
    wait = start_sum(torch.ones(2), group, name="routing counts", tracker=tracker)
    look()  # None: the rank computes while the sum is in flight
    assert wait().tolist() == [2.0, 2.0]
    look()
    assert seen == [("routing counts", 1), None, ("routing counts", 2), None]
    assert start_sum(torch.ones(2), None, name="routing counts")().tolist() == [1.0, 1.0], "a single rank"


def test_the_oldest_of_several_counts() -> None:
    tracker = CollectiveTracker()
    with tracker.inside("first", device=CPU), tracker.inside("second", device=CPU):
        position = tracker.oldest()
        assert position.collective == "first"


def test_a_collective_that_raises_was_left() -> None:
    tracker = CollectiveTracker()
    with pytest.raises(RuntimeError), tracker.inside("rows", device=CPU):
        raise RuntimeError
    assert tracker.oldest() is None


def test_on_cuda_it_is_left_when_the_stream_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [False]
    monkeypatch.setattr(watch_file, "_passed", lambda device: lambda: passed[0])
    tracker = CollectiveTracker()
    with tracker.inside("rows", device=torch.device("cuda")):
        pass
    with tracker.inside("sum", device=CPU):
        pass
    position = tracker.oldest()
    assert position.collective == "rows"  # the call has returned, but the collective has not run
    passed[0] = True
    assert tracker.oldest() is None


def test_on_cuda_no_entry_stays_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_file, "_passed", lambda device: lambda: True)
    tracker = CollectiveTracker()
    for _ in range(50):
        with tracker.inside("rows", device=torch.device("cuda")):
            pass
    assert len(tracker._unfinished) == 1  # each entry holds a CUDA event


def test_on_cuda_a_finished_entry_waits_for_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    numbers = itertools.count()
    # Each query of an event records the event's number and returns None, which means that the event has not passed.
    monkeypatch.setattr(watch_file, "_passed", lambda device: partial(asked.append, next(numbers)))
    tracker = CollectiveTracker()
    for _ in range(3):
        with tracker.inside("rows", device=torch.device("cuda")):
            pass
    assert asked == [0, 0]  # each collective queries only the oldest event
    assert len(tracker._unfinished) == 3


def test_the_watchdogs_thread_asks_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog's thread must choose the rank's GPU first, because the query of an event would otherwise open a
    context on GPU 0."""
    calls: list[tuple[str, str]] = []

    class Event:
        def record(self, stream: object) -> None: ...
        def query(self) -> bool:
            calls.append((threading.current_thread().name, "query"))
            return True

    def set_device(device: torch.device) -> None:
        calls.append((threading.current_thread().name, str(device)))

    for name, value in {"Event": Event, "set_device": set_device, "current_stream": lambda device: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    tracker = CollectiveTracker()
    with tracker.inside("rows", device=torch.device("cuda", 3)):
        pass
    thread = threading.Thread(target=tracker.oldest, name="watchdog")
    thread.start()
    thread.join()
    assert calls == [("watchdog", "cuda:3"), ("watchdog", "query")]


def test_among_unnoted_collectives_time_runs_from_the_last_noted_one() -> None:
    tracker = CollectiveTracker()
    with tracker.among("gradients"):
        before = tracker.oldest()
        with tracker.inside("rows", device=CPU):
            inside = tracker.oldest()
        after = tracker.oldest()
    assert [before.collective, inside.collective, after.collective] == ["gradients", "rows", "gradients"]
    assert (before.entered, after.entered) == (0, 1)
    assert after.since >= inside.since >= before.since
    assert tracker.oldest() is None


def test_without_a_watch_or_a_group_nothing_is_noted() -> None:
    with track_collective(None, "rows", device=CPU):
        pass
    tracker = CollectiveTracker()
    sum_over(torch.ones(1), None, tracker=tracker)
    assert tracker.entered == 0
