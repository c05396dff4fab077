"""Writes the latest scalars as a Prometheus textfile, for node_exporter's textfile collector.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4). All metrics are gauges, since a
resumed run may go back in steps.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.tags import meaning, split_tag

PREFIX = "moe_dist_"


class PrometheusSink(Sink):
    """Replaces `path` at each step by a rename, so that a reader never sees a partial file.

    Args:
        path: The textfile; node_exporter reads it only if its name ends in .prom.
        run_name: Value of the label `run` on every sample.
        resume_step: Last step of the earlier attempt; unused, since the first record replaces the old file.
    """

    def __init__(self, *, path: str | Path, run_name: str, resume_step: int = 0) -> None:
        self._path = Path(path)
        self._run_name = run_name
        self._step = resume_step
        self._latest: dict[str, float | None] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def step(self, record: Record) -> None:
        self._step = record.step
        self._latest.update(record.scalars)
        self._replace()

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._latest.update(scalars)
        self._replace()

    def _replace(self) -> None:
        # The collector ignores hidden files and names without .prom.
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        scratch.write_text(exposition(self._latest, step=self._step, run_name=self._run_name), encoding="utf-8")
        os.replace(scratch, self._path)


class MetricSample(NamedTuple):
    """One number for a monitoring system: metric, meaning, labels, value."""

    name: str
    meaning: str
    labels: dict[str, str]
    value: float


def samples(scalars: Mapping[str, float | None], *, step: int, run_name: str) -> Iterator[MetricSample]:
    """The step and every scalar that has a value; tags with a label become one metric with a label."""
    yield MetricSample(f"{PREFIX}step", "Steps taken.", {"run": run_name}, step)
    for tag, value in scalars.items():
        if value is None:
            continue
        family, label, label_value = split_tag(tag)
        labels = {"run": run_name} | ({label: label_value} if label and label_value else {})
        yield MetricSample(PREFIX + family.replace("/", "_"), meaning(tag), labels, value)


def exposition(scalars: Mapping[str, float | None], *, step: int, run_name: str) -> str:
    """The text of a scrape: each family once, with help and type, followed by its samples."""
    families: dict[str, list[str]] = {}
    for sample in samples(scalars, step=step, run_name=run_name):
        if sample.name not in families:
            help_text = sample.meaning.replace("\\", r"\\")
            families[sample.name] = [f"# HELP {sample.name} {help_text}", f"# TYPE {sample.name} gauge"]
        families[sample.name].append(_line(sample))
    return "".join(line + "\n" for lines in families.values() for line in lines)


def _line(sample: MetricSample) -> str:
    pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in sample.labels.items())
    return f"{sample.name}{{{pairs}}} {_number(sample.value)}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
