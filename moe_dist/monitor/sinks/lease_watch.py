"""The first of the sinks: no record goes to the others once another attempt writes to the run."""

from collections.abc import Callable, Mapping

from moe_dist.monitor.metrics import Record
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
