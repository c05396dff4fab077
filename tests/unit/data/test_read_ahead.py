"""The next step's batches are read during the current step, and equal the batches of a reader without a thread."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from moe_dist.data.loader import ReadAhead
from moe_dist.errors import DataError


def reader(log: list[tuple[int, str]], damaged: int | None = None) -> Callable[[int], Any]:
    def read(position: int) -> list[int]:
        log.append((position, "main" if threading.current_thread() is threading.main_thread() else "ahead"))
        if position == damaged:
            raise DataError(f"damaged at {position}")
        return [position, position + 1]

    return read


def test_the_next_step_is_read_in_a_thread() -> None:
    log: list[tuple[int, str]] = []
    ahead = ReadAhead(reader(log))
    assert ahead.batches(0, following=8) == [0, 1]
    ahead.settle()
    assert log == [(0, "main"), (8, "ahead")]  # read before it is requested
    assert ahead.batches(8, following=16) == [8, 9]
    assert ahead.batches(16, following=None) == [16, 17]
    assert log == [(0, "main"), (8, "ahead"), (16, "ahead")]


def test_another_position_is_read_anew() -> None:
    log: list[tuple[int, str]] = []
    ahead = ReadAhead(reader(log))
    ahead.batches(0, following=8)
    assert ahead.batches(40, following=None) == [40, 41]
    assert log[-1] == (40, "main")


def test_damage_ahead_ends_the_step_that_needs_the_data() -> None:
    ahead = ReadAhead(reader([], damaged=8))
    assert ahead.batches(0, following=8) == [0, 1]
    ahead.settle()
    with pytest.raises(DataError, match="damaged at 8"):
        ahead.batches(8, following=16)


def test_no_two_reads_run_at_once() -> None:
    """A loader is not thread-safe, so a read must wait until the reading thread has finished."""
    inside, release, most = [0], threading.Event(), [0]

    def read(position: int) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        if threading.current_thread() is not threading.main_thread():
            release.wait(600)
        inside[0] -= 1
        return [position]

    ahead = ReadAhead(read)
    ahead.batches(0, following=8)
    threading.Timer(0.05, release.set).start()
    ahead.batches(40, following=None)  # must wait for the thread
    assert most == [1]
