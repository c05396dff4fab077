"""Defines the interface of all sinks, and the wrapper that calls them. A sink must issue no collective, because only rank 0
has sinks.

A failing sink never ends a run. A checkpoint, however, waits for the records that a restart needs.
"""

import contextlib
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import CheckpointError
from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.statistics import EvaluationResult

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 30.0  # all sinks must close in this time; srun kills rank 0 if it runs 60 s longer than another rank


@dataclass(frozen=True)
class SinkContext:
    """The arguments with which a sink is made, in addition to the fields of its section.

    Attributes:
        resume_step: The step from which the run resumes (0 in a new run). A sink drops an earlier attempt's records of
            later steps, so that each step appears exactly once, however often the run resumes.
        evaluation_owed: Whether the resumed run will repeat the evaluation of `resume_step`. If so, a sink that stores
            evaluations drops the earlier evaluation.
        subject: The run that pictures show; None if there are no pictures.
    """

    folder: Path
    run_name: str = ""
    resume_step: int = 0
    evaluation_owed: bool = False
    total_steps: int = 0
    subject: Subject | None = None
    modalities: tuple[str, ...] = ()


class Sink:
    """A destination of records, made from a `SinkContext`. By default each method does nothing."""

    def step(self, record: Record) -> None:
        """Is called once for each step, in order, with the step's record."""

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        """Is called with an evaluation and its scalars (`metrics.evaluation_scalars`), after the step's record."""

    def hint(self, hint: Hint, step: int) -> None:
        """Is called with a warning, after the record of the step or evaluation that gave it."""

    def text(self, tag: str, markdown: str) -> None:
        """Is called with a page of text, such as the configuration."""

    def flush(self) -> None:
        """Writes all records so far to disk. Is called before a checkpoint is committed, because a run that resumes from
        this checkpoint does not make these records again."""

    def close(self) -> None:
        """Flushes records, then releases files and threads. Further calls do nothing."""


class ScalarSink(Sink, ABC):
    """A sink that stores only scalars, those of steps and those of evaluations."""

    def step(self, record: Record) -> None:
        self.log(record.scalars, record.step)

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self.log(scalars, result.step)

    def hint(self, hint: Hint, step: int) -> None:
        self.text(f"hint/{hint.kind}", f"step {step}: {hint.text}")

    @abstractmethod
    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Stores those scalars that have a value."""


class LeaseWatch(Sink):
    """Checks the lease before each record, by reading one small file. It must stand before the writing sinks in the list of
    sinks. `check` raises an error if this process may no longer write to the run folder."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def step(self, record: Record) -> None:
        self._watch()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._watch()

    def text(self, tag: str, markdown: str) -> None:
        self._watch()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):  # a failed read tells nothing about the lease; the next record checks it again
            self._check()


class GuardedSinks(Sink):
    """Passes every call to all sinks, in order. A sink that raises OSError is logged and then no longer called.

    A sink whose `flush` raises CheckpointError (JsonlSink) is still called. No checkpoint is committed until `flush`
    succeeds for all such sinks.

    Args:
        watch: Judges each record. All sinks get its hints, so that they say the same. None makes no hints.
    """

    def __init__(self, sinks: Sequence[Sink], watch: HintWatch | None = None) -> None:
        self._sinks, self._watch = list(sinks), watch
        self._unwritten: CheckpointError | None = None

    def step(self, record: Record) -> None:
        self._each(lambda sink: sink.step(record))
        self._judge(HintWatch.update, record)

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._each(lambda sink: sink.evaluation(result, scalars))
        self._judge(HintWatch.evaluate, result)

    def hint(self, hint: Hint, step: int) -> None:
        self._each(lambda sink: sink.hint(hint, step))

    def text(self, tag: str, markdown: str) -> None:
        self._each(lambda sink: sink.text(tag, markdown))

    def flush(self) -> None:
        """Flushes each sink. Raises no error; call `check_written` before a checkpoint is committed."""
        # Assigned after all sinks have flushed, because a thread that writes checkpoints may read it at any time.
        self._unwritten = self._each(lambda sink: sink.flush())

    def check_written(self) -> None:
        """Raises the CheckpointError of the last `flush`, if there was one."""
        if self._unwritten is not None:
            raise self._unwritten

    def close(self) -> None:
        """Closes all sinks at the same time, each in a thread. Waits at most CLOSE_SECONDS, then abandons the sinks that
        are not closed. Logs errors but raises none."""
        deadline = time.monotonic() + CLOSE_SECONDS
        threads = [threading.Thread(target=_close, args=(sink,), daemon=True) for sink in self._sinks]
        for thread in threads:
            thread.start()
        for sink, thread in zip(self._sinks, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.error(
                    "%s did not close in %g s: what it has not sent is not shown", type(sink).__name__, CLOSE_SECONDS
                )

    def _judge(self, judge: Callable[[HintWatch, Any], list[Hint]], judged: Record | EvaluationResult) -> None:
        """Gives all sinks the hints about a record or an evaluation. After an error of a rule, there are no more hints."""
        if self._watch is None:
            return
        try:
            hints = judge(self._watch, judged)
        except Exception:  # a wrong rule must not end the run
            logger.exception("step %d: hints failed; there are no more until the next start", judged.step)
            self._watch, hints = None, []
        for hint in hints:
            self.hint(hint, judged.step)

    def _each(self, call: Callable[[Sink], None]) -> CheckpointError | None:
        """Calls each sink. Returns the last CheckpointError, or None."""
        unwritten = None
        for sink in list(self._sinks):
            try:
                call(sink)
            except CheckpointError as error:
                unwritten = error
            except OSError as error:
                logger.error("%s: %s; it shows nothing more until the next start", type(sink).__name__, error)
                self._sinks.remove(sink)
        return unwritten


def _close(sink: Sink) -> None:
    try:
        sink.close()
    except Exception:  # an error of a sink must not change the result of the run
        logger.exception("%s failed to close", type(sink).__name__)
