"""Saves checkpoints asynchronously. Training copies the state between two steps, and goes on while a thread writes it.

- The thread's collectives use a separate Gloo process group. Gloo matches the calls of different ranks by their order in
  the group, so in a shared group a call of the thread could be matched with a call of the training. All ranks run the same
  phases of a save. They exchange a status after each phase, so that no rank waits for a failed rank.
- At most one save runs at a time; the next save waits until the previous one has ended.
- A failed save is logged and leaves the file `latest` unchanged. The training then saves again at the next regular
  interval. Before a run ends, the training waits for the last save.
- If the process dies during a save, the next start of the run deletes the unfinished folder.
"""

import logging
import threading
import time
from collections.abc import Callable

import torch

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import CheckpointState
from moe_dist.checkpoint.storage import HostBuffers, Snapshot
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_HOST = torch.device("cpu")


class CheckpointWriter:
    """Saves this rank's part of the state, with one save in flight at a time. All methods except `poll` are collective.

    Args:
        checkpoints: Manager of the run's checkpoints. No other code may use the manager's process group.
        asynchronous: If True, a thread writes a copy of the state. The copy needs as much host memory as the tensors that
            this rank writes. If False, no copy is made, and the training waits for each save.
        tracker: The watchdog's tracker, which treats the wait for a save as a collective.
        report: Function that rank 0 calls after each save, with the seconds from the call of `write` to the commit.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        *,
        asynchronous: bool,
        tracker: CollectiveTracker | None = None,
        report: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._checkpoints, self._asynchronous, self._tracker, self._report = checkpoints, asynchronous, tracker, report
        self._buffers = HostBuffers()
        self._in_flight: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def in_flight(self) -> bool:
        """True while this rank's thread writes a save."""
        return self._in_flight is not None and self._in_flight.is_alive()

    def write(self, step: int, state: CheckpointState, *, durable: bool) -> None:
        """Waits until the previous save has ended, then saves `state`.

        Args:
            durable: If True, `write` returns after the commit, and raises an error if the save fails. If False, `write` may
                return before the commit. If the disk then fails, a later `poll` or `wait` logs the error.

        Raises:
            CheckpointError: this save could not be written; raised only if `durable` is True.
            DivergedError: `state` contains nan or inf. Raised on all ranks, before anything is written.
            MoeDistError: this or the previous save failed, and a retry cannot help, for example because the lease was lost.
        """
        began = time.perf_counter()
        self.wait()  # needed, because the previous save reads the same buffers
        if self._asynchronous:
            snapshot = self._checkpoints.snapshot(step, state, self._buffers)
            self._in_flight = threading.Thread(
                target=self._write_snapshot, args=(snapshot, began), name=f"checkpoint-{step}", daemon=True
            )
            blocked = time.perf_counter() - began  # seconds that the training waited for the previous save and the copy
            self._in_flight.start()
            if self._checkpoints.rank == 0:
                logger.info("checkpoint step_%d: training went on after %.3f s", step, blocked)
        else:
            snapshot = self._checkpoints.snapshot(step, state)
            with track_collective(self._tracker, "checkpoint", device=_HOST):
                self._write_snapshot(snapshot, began)
        if durable:
            self._join()
            self._raise_failure()
        else:
            self.poll()

    def wait(self) -> None:
        """Waits until the last save has ended. If it failed, logs a CheckpointError, but raises any other error."""
        self._join()
        self.poll()

    def poll(self) -> None:
        """Does not wait. If the last save has ended with an error, logs or raises it like `wait`. Called after each
        training step."""
        if self._failure is None or self.in_flight:
            return
        try:
            self._raise_failure()
        except CheckpointError as error:
            logger.error("%s; training continues, the next interval tries again", error)

    def _join(self) -> None:
        if self._in_flight is not None:
            with track_collective(self._tracker, "checkpoint", device=_HOST):
                self._in_flight.join()  # the watchdog counts this wait as a collective
            self._in_flight = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_snapshot(self, snapshot: Snapshot, began: float) -> None:
        try:
            path = self._checkpoints.write(snapshot)  # issues collectives in the process group of `checkpoints`
        except Exception as error:  # raised by the next `poll` or `wait` in the training thread
            self._failure = error
            return
        if self._checkpoints.rank == 0:
            seconds, own = time.perf_counter() - began, snapshot.nbytes / 1e6
            logger.info("checkpoint %s: durable after %.3f s (%.1f MB of it from rank 0)", path.name, seconds, own)
            self._report(seconds)
