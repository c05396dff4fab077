"""Wraps all sinks so that a failing display never ends a run, while records that a restart needs must reach the disk."""

import logging
from collections.abc import Callable, Mapping, Sequence

from moe_dist.errors import CheckpointError
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult

logger = logging.getLogger(__name__)


class LeaseWatch(Sink):
    """A sink that checks the lease before each record, called before the sinks that write. Costs a read of one small file
    for each step.

    Args:
        check: Raises if this process may no longer write to the run.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def step(self, record: Record) -> None:
        self._check()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._check()

    def text(self, tag: str, markdown: str) -> None:
        self._check()


class GuardedSinks(Sink):
    """Passes every call to each sink. A sink whose disk fails is reported and left out until the next start. The exception
    is a sink that holds back checkpoints (metrics.jsonl, by raising CheckpointError from `flush`): it stays and tries
    again.

    Args:
        sinks: In the order in which they are called.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._unwritten: CheckpointError | None = None

    def step(self, record: Record) -> None:
        self._each(lambda sink: sink.step(record))

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._each(lambda sink: sink.evaluation(result, scalars))

    def text(self, tag: str, markdown: str) -> None:
        self._each(lambda sink: sink.text(tag, markdown))

    def flush(self) -> None:
        """Does not raise; `check_written` tells whether a checkpoint may follow."""
        # Assigned once, after all sinks: the thread that writes a checkpoint may read it meanwhile and must not see a
        # success too early.
        self._unwritten = self._each(lambda sink: sink.flush())

    def check_written(self) -> None:
        """Checks that the last `flush` made everything durable that a restart needs.

        Raises:
            CheckpointError: it did not.
        """
        if self._unwritten is not None:
            raise self._unwritten

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> CheckpointError | None:
        """Calls each sink; returns the last failure of one that holds back checkpoints."""
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
