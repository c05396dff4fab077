"""Reads a trace. `read_trace(folder)` reads manifests and indices; `Trace.step(n)` then reads the tokens of step n.

Shape letters are as in `format.py`; T is the number of tokens of all ranks.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from moe_dist.config.json_text import first_fault, parse_json
from moe_dist.config.regular_file import open_regular, read_regular
from moe_dist.errors import DataError
from moe_dist.monitor.trace.format import (
    ENTRY,
    FORMAT,
    MANIFEST,
    NO_CHOICE,
    TOKEN,
    VERSION,
    Manifest,
    content_check,
    entry_check,
)

MOST_MANIFEST, MOST_INDEX = 1 << 24, 1 << 28  # largest number of bytes of these files
MOST_STEP = 1 << 28  # largest number of bytes that a step has in each file of a rank; 65,536 tokens of 94 layers have 98 MB


class TracedStep(NamedTuple):
    """The traced tokens of one step. They are ordered by rank, then by position in the rank's batch.

    Attributes:
        tokens: `format.TOKEN` [T].
        ids: int16 [T, L, K]; -2 - c is a pair of column c that a capacity dropped, -1 is no choice.
        weights: float16 [T, L, K], or None.
        losses: float16 [T], loss in nats of the prediction at each token, nan without a label; or None.
    """

    tokens: np.ndarray
    ids: np.ndarray
    weights: np.ndarray | None
    manifest: Manifest
    losses: np.ndarray | None = None

    def choices(self) -> np.ndarray:
        """Returns each column's number of choices, including dropped pairs, int64 [L, C]: `Record.arrays['choices_LC']`."""
        return count_choices(self.ids, self.manifest.num_columns)

    def dropped(self) -> np.ndarray:
        """Returns each column's number of (token, expert) pairs that a capacity dropped, int64 [L, C]."""
        return count_choices(np.where(self.ids < NO_CHOICE, self.ids, NO_CHOICE), self.manifest.num_columns)


def count_choices(ids_TLK: np.ndarray, columns: int) -> np.ndarray:
    """Returns each column's number of choices, including dropped pairs, int64 [L, C]. `ids_TLK` is as in `TracedStep`."""
    column_TLK = np.where(ids_TLK < NO_CHOICE, -2 - ids_TLK, ids_TLK)
    layers = range(column_TLK.shape[1])
    return np.stack([np.bincount(column_TLK[:, i].ravel() + 1, minlength=columns + 1)[1:] for i in layers])


@dataclass(frozen=True)
class Attempt:
    """The folder and manifest of an attempt. For each step that all ranks wrote, `entries` has an index entry per rank."""

    folder: Path
    manifest: Manifest
    entries: dict[int, tuple[np.ndarray, ...]]


class Trace:
    """The steps of a run's trace. If a resumed run repeated a step, only the step's last version counts. `steps` lists, in
    rising order, the traced steps (counted from 1) that all ranks wrote."""

    def __init__(self, attempts: list[Attempt]) -> None:
        self.attempts = tuple(attempts)
        self._of_step: dict[int, Attempt] = {}
        for attempt in attempts:
            kept = {step: old for step, old in self._of_step.items() if step <= attempt.manifest.from_step}
            self._of_step = kept | dict.fromkeys(attempt.entries, attempt)
        self.steps = tuple(sorted(self._of_step))

    def step(self, number: int) -> TracedStep:
        """Reads a step. Raises DataError if the step was not traced, if its files are damaged, or if they have ids that the
        model lacks."""
        if number not in self._of_step:
            raise DataError(f"trace: step {number} is not among the {len(self.steps)} traced steps; take one of `steps`")
        attempt = self._of_step[number]
        manifest, parts = attempt.manifest, []
        for rank, entry in enumerate(attempt.entries[number]):
            parts.append(_rows(attempt.folder / f"rank_{rank}", entry, manifest))
        tokens, ids, weights, losses = (
            np.concatenate(part) if part[0] is not None else None for part in zip(*parts, strict=True)
        )
        assert tokens is not None
        assert ids is not None
        return TracedStep(tokens, ids, weights, manifest, losses)


def read_trace(folder: str | Path) -> Trace:
    """Reads the manifests and indices of a trace. Raises DataError if there is no trace, its format is unknown, or a file
    is shorter than its index says. `folder` is a run folder or the folder trace in it."""
    folder = Path(folder)
    folder = folder / "trace" if (folder / "trace").is_dir() else folder
    found = [_attempt(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))]
    if not found:
        raise DataError(f"{folder}: no trace, because no folder in it has a {MANIFEST}; set monitor.trace in the run")
    return Trace(sorted(found, key=lambda attempt: attempt.manifest.attempt))


def _attempt(folder: Path) -> Attempt:
    path = folder / MANIFEST
    try:
        content = parse_json(_content(path, MOST_MANIFEST), most_lists=1 << 18)
        known = (content["format"], content["version"]) == (FORMAT, VERSION)
        manifest = Manifest.from_json(content) if known else None
    except (ValueError, KeyError, TypeError) as error:
        why = first_fault(error) if isinstance(error, ValidationError) else f"{type(error).__name__}: {error!s:.200}"
        raise DataError(f"{path}: not the manifest of a trace ({why}); restore the file") from None
    if manifest is None:
        raise DataError(
            f"{path}: format={content['format']!r:.80}, version={content['version']!r:.80}: this reader knows {FORMAT!r}, "
            f"version {VERSION}; read it with the version of moe_dist that wrote it"
        )
    by_rank: list[dict[int, np.ndarray]] = []
    for rank in range(manifest.ranks):
        by_rank.append(_index(folder / f"rank_{rank}.index"))
        if not by_rank[-1]:
            break  # if a rank has no entries, no step is complete
    whole = set.intersection(*(set(entries) for entries in by_rank))  # the index of a killed rank may lack the last step
    return Attempt(folder, manifest, {step: tuple(entries[step] for entries in by_rank) for step in whole})


def _index(path: Path) -> dict[int, np.ndarray]:
    """Returns an index's entries by step, up to the first incomplete entry. A killed writer may leave such an entry."""
    if not path.exists():
        return {}
    content = _content(path, MOST_INDEX)
    entries = np.frombuffer(content, ENTRY, count=len(content) // ENTRY.itemsize)
    found = {}
    for entry in entries:
        if entry_check(entry) != entry["check"]:
            break
        found[int(entry["step"])] = entry
    return found


def _rows(stem: Path, entry: np.ndarray, manifest: Manifest) -> Sequence[np.ndarray | None]:
    """Returns the tokens, ids, weights and losses that one rank has for a step."""
    shape = (len(manifest.layers), manifest.choices)
    tokens = _read(stem.with_suffix(".tokens"), entry, TOKEN, ())
    ids = _read(stem.with_suffix(".ids"), entry, np.dtype("<i2"), shape)
    weights = _read(stem.with_suffix(".weights"), entry, np.dtype("<f2"), shape) if manifest.weights else None
    losses = _read(stem.with_suffix(".losses"), entry, np.dtype("<f2"), ()) if manifest.losses else None
    step = int(entry["step"])
    if content_check(tokens, ids, weights, losses) != entry["content"]:
        raise DataError(f"{stem}.ids, step {step}: the content does not have the checksum of its index; restore the files")
    column = np.where(ids < NO_CHOICE, -2 - ids, ids)
    if ids.size and column.max() >= manifest.num_columns:
        raise DataError(
            f"{stem}.ids, step {step}: id {column.max()} is outside the model, which has {manifest.num_columns} columns "
            f"({MANIFEST}, groups); take the manifest that belongs to these files"
        )
    modalities = tokens["modality"]
    if (wrong := modalities[(modalities < 0) | (modalities >= len(manifest.modalities))]).size:
        raise DataError(
            f"{stem}.tokens, step {step}: modality={wrong[0]} is outside the {len(manifest.modalities)} modalities of "
            f"{MANIFEST}; take the manifest that belongs to these files"
        )
    return tokens, ids, weights, losses


def _read(path: Path, entry: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the rows of a step from one file. Each row has the shape `shape`."""
    first, rows, numbers = int(entry["first"]), int(entry["rows"]), math.prod(shape)
    width = dtype.itemsize * numbers
    if rows * width > MOST_STEP:
        raise DataError(
            f"{path}, step {entry['step']}: {rows * width:,} bytes, and at most {MOST_STEP:,} are read; trace fewer tokens "
            "of a step (monitor.trace.tokens), or restore the index"
        )
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        within = min(first, rows) >= 0 and (first + rows) * width <= size
        found = np.fromfile(stream, dtype, count=rows * numbers, offset=first * width) if within else np.empty(0, dtype)
    if not within or len(found) < rows * numbers:
        raise DataError(
            f"{path}: {size} bytes, but step {entry['step']} ends at byte {(first + rows) * width}; the file was cut off: "
            "restore it, or read earlier steps"
        )
    return found.reshape(rows, *shape)


def _content(path: Path, most_bytes: int) -> bytes:
    """Returns the bytes of a file of the trace. Turns an OSError into a DataError."""
    try:
        return read_regular(path, most_bytes=most_bytes)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; restore the file") from error


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Opens a file of the trace. Turns an OSError into a DataError."""
    try:
        with open_regular(path) as stream:
            yield stream
    except OSError as error:
        # repr, because an error of pyarrow has no strerror, and its text ends with a line break.
        raise DataError(f"{path}: {error.strerror or repr(error):.100}; restore the file") from error
