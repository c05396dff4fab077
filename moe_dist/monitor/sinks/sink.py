"""The interface of all sinks. Only rank 0 has sinks; a sink issues no collective and does not touch the model."""

from collections.abc import Mapping

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.statistics import EvaluationResult


class Sink:
    """A destination of records. Methods that a sink does not define do nothing.

    A sink is created with `resume_step`, the last step to keep (0 in a new run): it drops an earlier attempt's records of
    later steps, so that each step appears exactly once after any number of resumes. The sinks for metrics.jsonl and
    TensorBoard also get `evaluation_owed`: the evaluation of that step will be repeated, because the earlier attempt died
    before its next checkpoint, and its result must go.
    """

    def step(self, record: Record) -> None:
        """Takes the record of a step. Steps come once each, in order."""

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        """Takes a held-out evaluation and its scalars (`metrics.evaluation_scalars`), after the record of its step."""

    def text(self, tag: str, markdown: str) -> None:
        """Takes a page of text: configuration, placement."""

    def flush(self) -> None:
        """Makes all records so far durable. Call it before a checkpoint is committed: records up to the checkpoint's step
        are not written again on resume."""

    def close(self) -> None:
        """Flushes and releases files and threads. A second call does nothing."""
