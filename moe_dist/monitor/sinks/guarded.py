"""All sinks as one that never ends a run: what is shown may fail, what a restart needs must be on the disk."""

import logging
from collections.abc import Callable, Mapping, Sequence

from moe_dist.errors import CheckpointError
from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult


class LeaseWatch:
    """Looks at the lease before each record; stands before the sinks that write. Costs a read of one small file a step.

    Args:
        check: Raises if this process may not write to the run any more.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def step(self, record: Record) -> None:
        self._check()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._check()

    def text(self, tag: str, markdown: str) -> None:
        self._check()

    def flush(self) -> None:
        """Nothing: what is made durable was written with a look."""

    def close(self) -> None:
        """Nothing to let go of."""


logger = logging.getLogger(__name__)


class GuardedSinks:
    """Hands everything to each sink. One whose disk fails is reported and left out until the next start, except that a sink
    which holds back checkpoints (metrics.jsonl, by raising CheckpointError from `flush`) is kept, and tries again.

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
        """Does not raise: whether a checkpoint may follow is asked by `check_written`."""
        # Set once all is known: the thread that writes a checkpoint may ask meanwhile, and must not be told of a success
        # that is not there yet.
        self._unwritten = self._each(lambda sink: sink.flush())

    def check_written(self) -> None:
        """Whether the last `flush` made everything durable that a restart needs.

        Raises:
            CheckpointError: it did not.
        """
        if self._unwritten is not None:
            raise self._unwritten

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> CheckpointError | None:
        """Returns the last failure of a sink that holds back checkpoints."""
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
