"""Opens a folder with records of another trainer's model. Like a run folder, it has metrics.jsonl, tensorboard/ and trace/.

Shape letters are as in `routers.py`; T' is the number of tokens without padding.
"""

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config.sinks.kinds import JsonlSinkSection, PrometheusSinkSection, TensorBoardSinkSection
from moe_dist.errors import ConfigError, DataError, MoeDistError
from moe_dist.monitor.attached.routers import GUIDE, Traced
from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.pictures import Subject
from moe_dist.monitor.routing_hints import Hint, for_another_trainer
from moe_dist.monitor.sinks.jsonl import METRICS, read_lines
from moe_dist.monitor.sinks.sink import GuardedSinks, Sink, SinkContext
from moe_dist.monitor.trace.foreign import NO_ID
from moe_dist.monitor.trace.format import MANIFEST, TOKEN, Manifest
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.monitor.trace.writer import TraceWriter

logger = logging.getLogger(__name__)


class HintSink(Sink):
    """Logs each hint as a warning."""

    def hint(self, hint: Hint, step: int) -> None:
        logger.warning("step %d: %s", step, hint.text)


# Name of a sink -> function that makes this sink.
SINKS: dict[str, Callable[[SinkContext], Sink]] = {
    "hints": lambda _: HintSink(),
    "jsonl": JsonlSinkSection().build,
    "tensorboard": TensorBoardSinkSection().build,  # imports TensorBoard, which takes seconds
    "prometheus": PrometheusSinkSection().build,
}


def open_together(
    folder: Path,
    sinks: Sequence[str | Sink],
    subject: Subject,
    manifest: Manifest,
    *,
    sequence_first: bool,
    pictures_every: int,
    rank: int,
    group: Any,
    device: torch.device,
) -> tuple["ChoiceWriter | None", Sink | None]:
    """Opens the sinks on rank 0, and the trace's files on each rank. With a group, all ranks take part in two small
    all-reduces, and if one rank fails, all ranks raise an error. Raises ConfigError as `Attached` does.

    Returns:
        The writer of this rank's trace, or None if `manifest` traces no steps. On rank 0 also the sinks, on other ranks
        None.
    """
    attempt, failed, opened, writer = 0, None, None, None
    if rank == 0:
        try:
            attempt = _take_attempt(folder, manifest)
        except ConfigError as error:
            failed = error
    model = zlib.crc32(repr((manifest.groups, manifest.layers)).encode())
    attempt, largest, smallest = _agree(folder, failed, (attempt, model, -model), group, device)
    if largest != -smallest:
        raise ConfigError(
            "attach: group: its ranks have routers of different layers or shapes; give the group of the ranks that "
            "hold the same layers",
            see=GUIDE,
        )
    try:
        if rank == 0:
            made = _open_sinks(sinks, folder, subject, manifest.from_step, pictures_every)
            opened = GuardedSinks(made, HintWatch(subject.groups, subject.moe_layers, words=for_another_trainer))
        if manifest.every:
            place = _place(folder, manifest.from_step, attempt)
            writer = ChoiceWriter(place, rank, manifest, sequence_first=sequence_first)
    except OSError as error:
        failed = _unusable(folder, error)
    except ConfigError as error:
        failed = error
    try:
        _agree(folder, failed, (), group, device)
    except ConfigError:
        for each in (writer, opened):
            if each is not None:
                each.close()
        raise
    return writer, opened


def _agree(folder: Path, failed: ConfigError | None, values: Sequence[int], group: Any, device: torch.device) -> list[int]:
    """Returns the maximum of each value over the ranks. Raises ConfigError if `failed` is not None on any rank."""
    told = torch.tensor([failed is not None, *values], dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    any_failed, *largest = told.tolist()
    if failed is None and any_failed:
        failed = ConfigError(f"attach: folder={folder}: another rank cannot use it; mend what its error says", see=GUIDE)
    if failed is not None:
        raise failed
    return largest


def _unusable(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"attach: folder={folder}: {error}; give a new folder that can be written", see=GUIDE)


def _place(folder: Path, from_step: int, attempt: int) -> Path:
    return folder / "trace" / f"from_step_{from_step}_attempt_{attempt}"


def _take_attempt(folder: Path, manifest: Manifest) -> int:
    """Writes the manifest of the next attempt. Returns the attempt's number. Raises ConfigError in the cases of
    `_next_attempt`, and if another process group took the attempt at the same time."""
    attempt = _next_attempt(folder, manifest)
    place = _place(folder, manifest.from_step, attempt)
    try:
        place.mkdir(exist_ok=True)
        with (place / MANIFEST).open("x") as file:  # fails if another process group has made the file
            file.write(replace(manifest, attempt=attempt).to_json())
    except FileExistsError as error:
        raise ConfigError(
            f"attach: folder={folder} was taken by another group at the same time; give each group a folder of its own",
            see=GUIDE,
        ) from error
    except OSError as error:
        (place / MANIFEST).unlink(missing_ok=True)  # later calls would fail at a half-written manifest
        raise _unusable(folder, error) from error
    return attempt


def _next_attempt(folder: Path, manifest: Manifest) -> int:
    """Makes the folder. Returns the number of the attempt that begins after step `from_step`. Raises ConfigError if the
    folder cannot be made, or has records of another training or another model."""
    path, step, earlier = folder / METRICS, manifest.from_step, ()
    try:
        (folder / "trace").mkdir(parents=True, exist_ok=True)
        steps = [line["step"] for line in read_lines(path)] if path.exists() else []
        if any(folder.glob(f"trace/*/{MANIFEST}")):
            trace = read_trace(folder)
            earlier, steps = trace.attempts, [*steps, *trace.steps]
    except (OSError, ValueError, DataError) as error:
        raise _unusable(folder, error) from error
    found = f"records up to step {max(steps)}" if any(steps) else ""
    if not found and not path.exists() and any(folder.glob("tensorboard/events.*")):
        found = "TensorBoard events"
    if found and not step:
        raise ConfigError(
            f"attach: folder={folder} has {found}; give a new folder, or last_step=N to go on after step N: then later "
            "records are dropped",
            see=GUIDE,
        )
    for attempt in earlier:
        if (attempt.manifest.groups, attempt.manifest.layers) != (manifest.groups, manifest.layers):
            raise ConfigError(f"attach: folder={folder} has records of another model; give a new folder", see=GUIDE)
    return len(earlier) + 1


def _open_sinks(sinks: Sequence[str | Sink], folder: Path, subject: Subject, step: int, pictures_every: int) -> list[Sink]:
    """Makes the sinks that are given by name, and takes given sink objects as they are. Raises ConfigError if a name is
    unknown or a sink cannot be opened."""
    opened: list[Sink] = []
    named = SINKS | {"tensorboard": TensorBoardSinkSection(pictures_every=pictures_every).build}
    for sink in sinks:
        if isinstance(sink, str) and sink not in SINKS:
            raise ConfigError(f"attach: sinks: {sink!r} is unknown; give {', '.join(SINKS)}, or a Sink object", see=GUIDE)
    modalities = subject.groups[0].modalities
    context = SinkContext(folder, run_name=folder.name, resume_step=step, subject=subject, modalities=modalities)
    for sink in sinks:
        try:
            opened.append(named[sink](context) if isinstance(sink, str) else sink)
        except (OSError, MoeDistError) as error:
            for each in opened:
                each.close()
            raise ConfigError(
                f"attach: sinks: {sink!r} cannot be opened in {folder}: {error}; leave it out, or give another folder",
                see=GUIDE,
            ) from error
    return opened


class ChoiceWriter:
    """Writes this rank's part of the trace. Raises OSError if the files cannot be opened. The routers order tokens [S, B]
    if `sequence_first` is True, otherwise [B, S]."""

    def __init__(self, place: Path, rank: int, manifest: Manifest, *, sequence_first: bool) -> None:
        place.mkdir(parents=True, exist_ok=True)  # rank 0 may have made the folder only on another node's disk
        self._writer = TraceWriter(place, rank, weights=True)
        self._rank, self._manifest, self._sequence_first = rank, manifest, sequence_first
        self._sequences = 0  # number of sequences in this rank's traced steps so far

    def due(self, step: int) -> bool:
        """Returns whether step `step` (counted from 1) is traced."""
        return (step - 1) % self._manifest.every == 0

    def write(self, step: int, parts: Sequence[Sequence[Traced]]) -> None:
        """Writes the choices in each layer's forward passes. Copying them to the host costs one sync per forward pass."""
        if len({tuple(len(each.ids_TK) for each in forwards) for forwards in parts}) > 1:
            logger.error("step %d is not traced, because the routers saw different tokens", step)
            return
        left, found = self._manifest.tokens, []
        for forwards in zip(*parts, strict=True):
            tokens, rows = self._tokens(forwards[0])
            rows = rows[:left]
            left = None if left is None else left - len(rows)
            ids, weights = (
                np.stack([_host(each)[rows] for each in field], axis=1)
                for field in ([each.ids_TK for each in forwards], [each.weights_TK for each in forwards])
            )
            found.append((tokens[rows], ids, weights))
        if found:
            self._writer.add(step, *(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def close(self) -> None:
        self._writer.close()

    def _tokens(self, forward: Traced) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens in the router's order, `TOKEN` [T], and the indices of those that are not padding."""
        ids_BS, mask_BS = (
            None if each is None or each.numel() != len(forward.ids_TK) else _host(each) for each in forward.batch
        )
        known_BS = ids_BS if ids_BS is not None else mask_BS
        row_BS, position_BS = np.indices((1, len(forward.ids_TK)) if known_BS is None else known_BS.shape)
        columns = (
            self._sequences + row_BS,
            position_BS,
            np.full_like(row_BS, NO_ID) if ids_BS is None else ids_BS,
            np.ones_like(row_BS) if mask_BS is None else mask_BS != 0,
        )
        sequence, position, ids, real = (each.T.flatten() if self._sequence_first else each.flatten() for each in columns)
        tokens = np.zeros(len(sequence), TOKEN)
        tokens["sequence"] = sequence * self._manifest.ranks + self._rank
        tokens["position"], tokens["token"] = position, ids
        self._sequences += len(row_BS)
        return tokens, np.flatnonzero(real)


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
