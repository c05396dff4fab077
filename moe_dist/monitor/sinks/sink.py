"""What every sink can do. Only rank 0 has sinks; none of them issues a collective or touches the model."""

from collections.abc import Mapping
from typing import Protocol

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.statistics import EvaluationResult


class Sink(Protocol):
    """A place that records go to.

    A sink is made with `resume_step`, the last step that stays (0 in a new run): what an earlier attempt left of later
    steps is dropped, so that each step is there exactly once after any number of resumes. Those of metrics.jsonl and of
    TensorBoard are told as well whether the evaluation of that step is still owed: an attempt that took it and died before
    its next checkpoint has left one.
    """

    def step(self, record: Record) -> None:
        """Takes the record of a step. Steps come once each, in order."""
        ...

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        """Takes a held-out evaluation and its scalars (`metrics.evaluation_scalars`), after the record of its step."""
        ...

    def text(self, tag: str, markdown: str) -> None:
        """Takes a page of text: configuration, placement."""
        ...

    def flush(self) -> None:
        """Makes all that was taken durable. Call it before a checkpoint is committed: records up to the checkpoint's
        step are not written again on resume."""
        ...

    def close(self) -> None:
        """Flushes and lets go of files and threads. A second call does nothing."""
        ...
