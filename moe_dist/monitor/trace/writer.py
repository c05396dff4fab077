"""Writes one rank's part of a trace in a thread. Training waits only if `WAITING` steps already wait for the disk."""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from moe_dist.monitor.trace.format import ENTRY, TOKEN, content_check, entry_check

WAITING = 4  # number of steps that may wait for the disk; each keeps its tokens in memory
CLOSE_SECONDS = 30.0

logger = logging.getLogger(__name__)
Step = tuple[int, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]


class TraceWriter:
    """Appends steps to the files of `rank` in `folder`, the folder of an attempt. An error, such as a full disk, is logged.
    It ends the trace but not the run.

    If a process is killed, at most the steps that wait for the disk are lost. A step counts only if it has an index entry,
    which is written after the step's tokens.
    """

    def __init__(self, folder: Path, rank: int, *, weights: bool, losses: bool = False) -> None:
        names = ("tokens", "ids", *(["weights"] if weights else []), *(["losses"] if losses else []), "index")
        self._files: dict[str, IO[bytes]] = {name: (folder / f"rank_{rank}.{name}").open("wb") for name in names}
        self._stem, self._rows, self._failed = folder / f"rank_{rank}", 0, False
        self._queue: queue.Queue[Step | None] = queue.Queue(maxsize=WAITING)
        self._thread = threading.Thread(target=self._work, name="trace", daemon=True)
        self._thread.start()

    def add(
        self, step: int, tokens: np.ndarray, ids: np.ndarray, weights: np.ndarray | None, losses: np.ndarray | None = None
    ) -> None:
        """Queues a step: tokens `TOKEN` [T], ids int16 [T, L, K], weights float16 [T, L, K], losses float16 [T]. The caller
        must not change these arrays afterwards."""
        assert tokens.dtype == TOKEN, tokens.dtype
        assert ids.dtype == np.int16, ids.dtype
        self._queue.put((step, tokens, ids, weights, losses))

    def flush(self) -> None:
        """Waits until all queued steps are on disk. Call it before a checkpoint is saved: a run that resumes from the
        checkpoint does not repeat these steps."""
        self._queue.join()
        self._guarded(self._sync)

    def close(self) -> None:
        """Writes the queued steps and closes the files. Gives up after CLOSE_SECONDS. Further calls do nothing."""
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        with contextlib.suppress(queue.Full):  # the queue stays full if the disk hangs
            self._queue.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.error("%s: not written within %g s: the last steps of the trace are missing", self._stem, CLOSE_SECONDS)

    @property
    def incomplete(self) -> bool:
        """Returns whether steps are missing on disk after `close`. The log says why."""
        return self._failed or self._thread.is_alive()

    def _work(self) -> None:
        while (step := self._queue.get()) is not None:
            self._guarded(lambda step=step: self._write(*step))
            self._queue.task_done()
        self._guarded(self._sync)
        for file in self._files.values():
            with contextlib.suppress(OSError):  # `close` repeats a failed write, which may fail again
                file.close()
        self._queue.task_done()

    def _write(self, step: int, *arrays: np.ndarray | None) -> None:
        found = dict(zip(("tokens", "ids", "weights", "losses"), arrays, strict=True))
        parts = {name: array for name, array in found.items() if name in self._files and array is not None}
        for name, array in parts.items():
            self._files[name].write(np.ascontiguousarray(array).data)
            self._files[name].flush()  # the content must reach the file before the index entry
        entry = np.array([(step, self._rows, len(parts["tokens"]), content_check(*parts.values()), 0)], ENTRY)
        entry["check"] = entry_check(entry)
        self._files["index"].write(entry.tobytes())
        self._files["index"].flush()
        self._rows += len(parts["tokens"])

    def _sync(self) -> None:
        for file in self._files.values():  # the index is last
            os.fsync(file.fileno())

    def _guarded(self, action: Callable[[], None]) -> None:
        """Runs `action` unless an earlier error has ended the trace. An error ends the trace but not the writer's thread,
        because without this thread `add` would wait forever."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            logger.error("%s: %r; no further step counts in the trace until the next start", self._stem, error)
