"""Defines the sink that writes metrics.jsonl, one line for each step, evaluation and hint. All curves and
pictures of a run can be made from this file.

A crash loses at most the line that is just being written. If the disk is full or fails, no line is lost: lines wait in
memory until the disk accepts them. A checkpoint is committed only when all lines up to its step are on disk. A restarted
run therefore finds the lines of all steps up to its checkpoint.
"""

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json

from moe_dist.errors import CheckpointError, DataError
from moe_dist.monitor.metrics import Record, depth_line
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.sinks.sink import Sink, SinkContext
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.weight_hints import update_ratios

logger = logging.getLogger(__name__)
METRICS = "metrics.jsonl"

# Every line begins with the keys `step` and `kind`, so that a resumed run finds its step without parsing JSON.
LINE_BEGIN = re.compile(rb'\{"step":(\d{1,18}),"kind":"(\w+)",')
LONGEST_LINE = 1 << 24  # in bytes; a record of 128 layers with 1,024 experts has 4 MB
MOST_LISTS = 1 << 16  # largest number of lists and mappings of a record; its arrays have a list per layer
MOST_UNREADABLE = 1 << 26  # in bytes; each attempt leaves at most one incomplete line
BUFFER = 1 << 20  # in bytes; with the usual buffer of 8 KB, reading a long line is slow
STORED = ("skipped", "scalars", "losses", "labels", "epochs", "balance_coefficient", "ledger", "host")  # fields of `Record`


class JsonlSink(Sink):
    """Appends each record as a line to metrics.jsonl. Lines are written at once, so that a reader can follow the file. One
    line in `arrays_every` steps also has the arrays (the number of choices of every expert in every layer)."""

    def __init__(self, context: SinkContext, *, arrays_every: int = 1, clock: Callable[[], float] = time.time) -> None:
        self._path, self._arrays_every, self._clock = context.folder / METRICS, arrays_every, clock
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Kind of hint -> its last step. Each later step repeats it, so that a reader of the file's end misses no hint.
        self._said = drop_lines_after(self._path, context.resume_step, evaluation_owed=context.evaluation_owed)
        self._file = self._path.open("ab", buffering=0)  # unbuffered, so that a killed process loses no written line
        self._waiting = bytearray()  # bytes that the disk has not accepted yet
        self._told = False  # True if the current disk error is in the log already

    def step(self, record: Record) -> None:
        line = {
            "step": record.step,
            "kind": "step",
            "time": self._clock(),
            **{name: getattr(record, name) for name in STORED},
            **({"load": record.load} if record.load else {}),
            **({} if record.mixture_of_depths is None else {"mixture_of_depths": depth_line(record.mixture_of_depths)}),
            **({} if record.weights is None else {"updates": update_ratios(record.weights)}),
            **({"rank_balance": [each.line for each in record.levers]} if record.levers else {}),
            **({"hints": self._said} if self._said else {}),
        }
        if record.step % self._arrays_every == 0:
            line["arrays"] = {name: array.tolist() for name, array in record.arrays.items()}  # arrays fill most of a line
        self._write(line)

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._write(
            {
                "step": result.step,
                "kind": "evaluation",
                "time": self._clock(),
                "scalars": scalars,
                "losses": result.loss,
                "tokens": result.tokens,
                "ablated_losses": result.ablated_loss,
                "choice_losses": result.choice_loss,
                "experts_per_token": result.experts_per_token,
                "choice_experts_per_token": result.choice_experts_per_token,
                "balance_note": result.balance_note,
                **({} if result.compute_map is None else {"experts_by_kind_of_token": result.compute_map.mean}),
                **({} if result.mixture_of_depths is None else {"mixture_of_depths": depth_line(result.mixture_of_depths)}),
            }
        )

    def hint(self, hint: Hint, step: int) -> None:
        self._said[hint.kind] = step
        self._write({"step": step, "kind": "hint", "time": self._clock(), "hint": hint.kind, "text": hint.text})

    def flush(self) -> None:
        """Returns when all lines are on disk. Raises CheckpointError if the disk does not accept them. They then stay in
        memory, and the next checkpoint must wait."""
        if self._file.closed:
            return
        try:
            self._drain()
            os.fsync(self._file.fileno())  # waits for the disk
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: its last lines cannot be written: {error.strerror or error}; without them no checkpoint is "
                "saved: make room on that disk, or look at it",
                see="docs/reliability.md",
            ) from error

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self.flush()
        except CheckpointError as error:
            logger.error("%s", error)
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        # Lines are not synced to disk here. A killed process loses no line; a power cut loses those since the last flush().
        odd = {tag: str(v) for tag, v in line.get("scalars", {}).items() if v is not None and not math.isfinite(v)}
        finite = _finite({**line, **({"non_finite": odd} if odd else {})})  # as text, `non_finite` has each nan and inf
        self._waiting += json.dumps(finite, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            self._drain()
            self._told = False
        except OSError as error:
            if not self._told:
                logger.error("%s: %s; lines wait in memory until it can be written", self._path, error.strerror or error)
            self._told = True

    def _drain(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]  # a write may accept only a part of the bytes


def read_lines(path: str | Path, damaged: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the lines of a metrics.jsonl in their order. Leaves out an incomplete last line. If an earlier line is not a
    record, adds its number to `damaged`, or raises ValueError if `damaged` is None."""
    number = 0
    with Path(path).open("rb", buffering=BUFFER) as file:
        while text := file.readline(LONGEST_LINE):
            number += 1
            line = _parsed(text)
            record = isinstance(line, dict) and isinstance(step := line.get("step"), int) and 0 <= step < 1 << 53
            if record and isinstance(line.get("scalars", {}), dict):
                yield line
            elif file.read(1):
                if damaged is None:
                    raise ValueError(f"{path}: line {number} is not a record")
                damaged.append(f"line {number}")
                file.seek(-1, 1)


def drop_lines_after(path: Path, step: int, *, evaluation_owed: bool = False) -> dict[str, int]:
    """Drops the lines of steps after `step`, and unreadable lines, such as a line that a crash cut short. `evaluation_owed`
    also drops the evaluation of `step`, because the resumed run repeats it. Warns if steps up to `step` have no record.
    Returns the last step of each kind of hint that is kept.

    One rename replaces metrics.jsonl. A crash therefore leaves the old file whole. If an earlier writer was suspended and
    wakes up, it writes to a deleted file. The file is read once. If more than MOST_UNREADABLE bytes are no records, raises
    DataError and leaves the file unchanged."""
    recorded = bytearray(step)  # 1 for each step whose record is kept
    said: dict[str, int] = {}
    if not path.exists():
        _warn_of_missing(path, recorded)
        return said
    kept_path = path.with_name(path.name + ".kept")
    unreadable = dropped = size = 0
    with path.open("rb", buffering=BUFFER) as old, kept_path.open("wb") as new:
        while text := old.readline(LONGEST_LINE):
            begin = LINE_BEGIN.match(text)
            line = _parsed(text)
            if begin is None or line is None:  # the line is incomplete, or its end is not on disk
                unreadable, size = unreadable + 1, size + len(text)
                if size >= MOST_UNREADABLE:
                    kept_path.unlink()
                    raise DataError(
                        f"{path}: its lines before byte {old.tell():,} have {size:,} bytes that are no records, and a run "
                        f"leaves less than {MOST_UNREADABLE:,}; move the file aside, or cut it behind its last record, and "
                        "start again"
                    )
            elif int(begin[1]) > step or (evaluation_owed and int(begin[1]) == step and begin[2] == b"evaluation"):
                dropped += 1
            else:
                new.write(text)
                if begin[2] == b"step" and int(begin[1]):
                    recorded[int(begin[1]) - 1] = 1
                elif begin[2] == b"hint":
                    said[str(line.get("hint"))] = int(begin[1])
        new.flush()
        os.fsync(new.fileno())  # the content must be on disk before the rename
    os.replace(kept_path, path)
    if unreadable or dropped:
        told = "%s: going on after step %d: dropped %d lines that are written again and %d unfinished ones"
        logger.info(told, path, step, dropped, unreadable)
    _warn_of_missing(path, recorded)
    return said


def _parsed(text: bytes) -> Any:
    """Returns the values of a line. None if it is no JSON, was cut short, or has too many lists for a record."""
    if not text.endswith(b"\n") or text.count(b"[") + text.count(b"{") > MOST_LISTS:
        return None
    try:
        return from_json(text)  # parses some hundred MB per second
    except ValueError:
        return None


def _warn_of_missing(path: Path, recorded: bytearray) -> None:
    if missing := recorded.count(0):
        told = "%s: the records of %d of the steps %d to %d are missing or damaged; the run goes on and keeps the others"
        logger.warning(told, path, missing, recorded.find(0) + 1, recorded.rfind(0) + 1)


def _finite(value: Any) -> Any:
    """Replaces nan and inf by None, and numpy's numbers by Python's."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
