"""Defines two sinks that publish the latest scalars as labelled samples: a textfile for Prometheus, datagrams for Ray.

The textfile has the format of https://prometheus.io/docs/instrumenting/exposition_formats/ (text, version 0.0.4). All
metrics are gauges, because a resumed run repeats steps, and a Prometheus counter must never fall.
"""

import contextlib
import json
import math
import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.sinks.sink import ScalarSink, SinkContext
from moe_dist.monitor.tags import meaning, split_tag

PREFIX = "moe_dist_"


class CountingSink(ScalarSink):
    """A sink that shows the number of hints of each kind, because samples have no texts."""

    def __init__(self) -> None:
        self._hints: Counter[str] = Counter()

    def hint(self, hint: Hint, step: int) -> None:
        self._hints[hint.kind] += 1
        self.log({f"hints/{hint.kind}": float(self._hints[hint.kind])}, step)


class PrometheusSink(CountingSink):
    """Replaces the file `path` in each step by renaming a new file over it, so that a reader never sees a partial file. By
    default `path` is metrics.prom in the run folder. node_exporter reads only files whose names end in .prom."""

    def __init__(self, context: SinkContext, *, path: str | None = None) -> None:
        super().__init__()
        self._path = Path(path or context.folder / "metrics.prom")
        self._run_name = context.run_name
        self._latest: dict[str, float | None] = {}
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        self._latest.update(scalars)
        # node_exporter ignores this temporary file, because the file's name does not end in .prom.
        scratch = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        scratch.write_text(exposition(self._latest, step=step, run_name=self._run_name), encoding="utf-8")
        os.replace(scratch, self._path)  # atomic; needs no fsync, because the next step replaces the file


class MetricSample(NamedTuple):
    """One number, as a monitoring system gets it."""

    name: str
    meaning: str
    labels: dict[str, str]
    value: float


def samples(scalars: Mapping[str, float | None], *, step: int, run_name: str) -> Iterator[MetricSample]:
    """Yields the step and each scalar that has a value. If a tag names a group or modality, this name becomes a label."""
    yield MetricSample(f"{PREFIX}step", "Steps taken.", {"run": run_name}, step)
    for tag, value in scalars.items():
        if value is None:
            continue
        family, label, label_value = split_tag(tag)
        labels = {"run": run_name} | ({label: label_value} if label and label_value else {})
        yield MetricSample(metric_name(family), meaning(tag), labels, value)


def metric_name(family: str) -> str:
    """Returns the metric name of a family. Adds s to endings that Prometheus reserves, such as `_count`."""
    name = PREFIX + family.replace("/", "_")
    return f"{name}s" if name.endswith(("_bucket", "_count", "_sum", "_total")) else name


def exposition(scalars: Mapping[str, float | None], *, step: int, run_name: str) -> str:
    """Returns the text of the file: each metric with its help and type, followed by the metric's samples."""
    families: dict[str, list[str]] = {}
    for sample in samples(scalars, step=step, run_name=run_name):
        if sample.name not in families:
            help_text = sample.meaning.replace("\\", r"\\")
            families[sample.name] = [f"# HELP {sample.name} {help_text}", f"# TYPE {sample.name} gauge"]
        pairs = ",".join(f'{key}="{_escape(text)}"' for key, text in sample.labels.items())
        families[sample.name].append(f"{sample.name}{{{pairs}}} {_number(sample.value)}")
    return "".join(line + "\n" for lines in families.values() for line in lines)


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class RaySink(CountingSink):
    """Sends the scalars of each step to the actor of rank 0 (`launchers/ray/rank.py`), as one datagram to a Unix socket.

    The Ray launcher enables this sink by an environment variable, so that a run has the same configuration with any
    launcher. Training does not wait. A datagram is therefore lost if nothing reads the socket or its buffer is full;
    metrics.jsonl has all records.
    """

    def __init__(self, *, socket_path: str, run_name: str, resume_step: int = 0) -> None:
        super().__init__()
        self._path, self._run_name = socket_path, run_name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # training must not wait for a reader

    def close(self) -> None:
        self._socket.close()

    def log(self, scalars: Mapping[str, float | None], step: int) -> None:
        content = json.dumps(list(samples(scalars, step=step, run_name=self._run_name)))
        with contextlib.suppress(OSError):  # no reader, or a full buffer
            self._socket.sendto(content.encode(), self._path)
