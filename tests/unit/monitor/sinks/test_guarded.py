"""A sink that fails gets no further records, and the run goes on. A failed sink delays checkpoints only if a restart
needs its records."""

import threading
from typing import Any

import pytest

from moe_dist.errors import CheckpointError
from moe_dist.monitor.sinks.sink import GuardedSinks
from tests.support.messages import refused


class Recorder:
    """A sink that records its calls, and raises on request."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> None:
            self.calls.append(name)
            if self.error is not None:
                raise self.error

        return call


def test_every_sink_hears_everything() -> None:
    first, second = Recorder(), Recorder()
    sinks: Any = GuardedSinks([first, second])
    sinks.step(None)
    sinks.evaluation(None, {})
    sinks.text("a", "b")
    sinks.flush()
    sinks.check_written()
    sinks.close()
    assert first.calls == second.calls == ["step", "evaluation", "text", "flush", "close"]


def test_a_sink_whose_disk_fails_is_reported_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    failing, healthy = Recorder(), Recorder()
    sinks: Any = GuardedSinks([failing, healthy])
    failing.error = OSError(28, "No space left on device")
    for _ in range(3):
        sinks.step(None)
    sinks.flush()
    sinks.check_written()
    assert failing.calls == ["step"]
    assert healthy.calls == ["step"] * 3 + ["flush"]
    assert (
        caplog.text.count("Recorder: [Errno 28] No space left on device; it shows nothing more until the next start") == 1
    )


def test_records_that_a_restart_needs_hold_back_the_checkpoint_until_they_are_written() -> None:
    records, other = Recorder(), Recorder()
    sinks: Any = GuardedSinks([records, other])
    records.error = CheckpointError("m.jsonl: cannot be written")
    sinks.flush()
    with refused(CheckpointError, "m.jsonl"):
        sinks.check_written()
    assert other.calls == ["flush"]
    records.error = None
    sinks.flush()
    sinks.check_written()
    assert records.calls == ["flush", "flush"]


def test_a_checkpoint_is_held_back_until_a_flush_that_failed_before_has_succeeded() -> None:
    """The checkpoint thread may call `check_written` at any time, even during a flush."""
    records, sinks = Recorder(), GuardedSinks([])
    records.error = CheckpointError("m.jsonl: cannot be written")
    asked: list[bool] = []

    class Asking:
        def flush(self) -> None:
            try:
                sinks.check_written()
                asked.append(True)
            except CheckpointError:
                asked.append(False)

    sinks._sinks = [Asking(), records]  # pyright: ignore
    sinks.flush()
    records.error = None
    sinks.flush()
    sinks.flush()
    assert asked == [True, False, True]


def test_an_error_of_ours_is_not_hidden() -> None:
    wrong = Recorder()
    wrong.error = ValueError("a bug")
    with refused(ValueError):
        GuardedSinks([wrong]).flush()  # pyright: ignore


def test_closing_has_a_budget_and_hides_what_a_display_raises(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks close when the run is done, so a slow or broken sink must not delay the run or make it fail."""
    monkeypatch.setattr("moe_dist.monitor.sinks.sink.CLOSE_SECONDS", 0.2)
    slow, broken, healthy, end = Recorder(), Recorder(), Recorder(), threading.Event()
    slow.close = end.wait  # type: ignore[attr-defined]
    broken.error = ValueError("connection lost")
    GuardedSinks([slow, broken, healthy]).close()  # pyright: ignore
    end.set()
    assert broken.calls == healthy.calls == ["close"]
    assert "Recorder did not close in 0.2 s" in caplog.text
    assert "Recorder failed to close" in caplog.text
    assert "ValueError: connection lost" in caplog.text
