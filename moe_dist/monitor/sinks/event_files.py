"""Removes events from TensorBoard's event files on resume, for the steps that will be written again.

TensorBoard's own mark for this (`purge_step`) is ignored by its fast server: an earlier attempt's curve or picture would
stay until one of the same tag is written at the same step or before.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]: made at import
from tensorboard.summary.writer.record_writer import RecordWriter


def drop_events_after(folder: str | Path, step: int, *, evaluation_owed: bool = False) -> None:
    """Drops the events of steps after `step` from the event files in `folder`, and if it is owed also the evaluation of
    `step`. Each file is replaced by one rename.

    Works from the newest file back to the first that has steps and needs no cut: older attempts were cut when it began.
    Reads one attempt's events, about ten seconds for 100,000 steps.
    """
    for path in sorted(Path(folder).glob("events.out.tfevents.*"), key=_began_at, reverse=True):
        if _cut(path, step, evaluation_owed):
            return


def _cut(path: Path, step: int, evaluation_owed: bool) -> bool:
    """Cuts a file; returns whether it had steps and all of them stay."""
    kept_path = path.with_name("kept")  # readers ignore a file without 'tfevents' in its name
    kept_steps = dropped = False
    with kept_path.open("wb") as file:
        writer = RecordWriter(file)
        for raw in _records(path):
            event = Event.FromString(raw)
            if event.step > step or (evaluation_owed and event.step == step and _is_evaluation(event)):
                dropped = True
            else:
                kept_steps |= event.step > 0  # the file's version is an event of step 0
                writer.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(kept_path, path)  # always replace: an old writer that wakes up then writes to a deleted file
    return kept_steps and not dropped


def _is_evaluation(event: Event) -> bool:
    """The scalars of an evaluation are one event that begins with the loss (`metrics.evaluation_scalars`)."""
    return bool(event.summary.value) and event.summary.value[0].tag.startswith("eval/")


def _records(path: Path) -> Iterator[bytes]:
    """Serialized events; stops silently at a torn one, as all readers do."""
    return RawEventFileLoader(str(path)).Load()


def _began_at(path: Path) -> tuple[int, int]:
    """Sort key from the name events.out.tfevents.<seconds>.<host>.<pid>.<count>; the host may contain dots."""
    parts = path.name.split(".")
    return int(parts[3]), int(parts[-1])
