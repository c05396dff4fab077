"""Asynchronous saves: the state is copied between two steps, and a thread writes the copy while the training continues.

- The thread's collectives have a process group of their own. Gloo matches the calls of a group by their order, and only
  this thread uses the group during a save, so its calls cannot be matched with calls of the training. All ranks run the
  same phases and exchange a status after each, so no rank waits for a failed rank.
- At most one save is in flight; the next save waits for it.
- A failed save is logged and leaves `latest` unchanged; the next interval tries again. A run waits for its last save and
  for the save before a stop.
- If the process dies during a save, the next start of the run deletes the partial folder.
"""

import logging
import threading
import time
from collections.abc import Callable

import torch

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import CheckpointState
from moe_dist.checkpoint.storage import HostBuffers, Snapshot, take_snapshot
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_HOST = torch.device("cpu")


class CheckpointWriter:
    """Saves the states of one rank; all methods except `poll` are collective.

    Args:
        checkpoints: Manager of the run's checkpoints; nothing else may use its process group.
        asynchronous: If True, a thread writes a copy in host memory, which is as large as this rank's part of the state. If
            False, no copy is made, and the training waits for each save.
        tracker: Tracker of the watchdog, which counts the wait for a save as a collective.
        report: Function that rank 0 calls after each save, with the seconds that it took until it was durable.
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
        """True while this rank writes a save."""
        return self._in_flight is not None and self._in_flight.is_alive()

    def write(self, step: int, state: CheckpointState, *, durable: bool) -> None:
        """Waits for the save in flight, then saves a state.

        Args:
            durable: If True, `write` returns after the commit, and raises if the save fails. If False, a failed save is
                logged later and does not end the run.

        Raises:
            CheckpointError: a durable save could not be written.
            MoeDistError: this save or the save in flight failed, and a retry cannot help, as after a lost lease.
        """
        began = time.perf_counter()
        self.wait()  # the buffers are reused, so the previous save must be done
        if self._asynchronous:
            snapshot = take_snapshot(step, state, self._buffers)
            self._in_flight = threading.Thread(
                target=self._write_snapshot, args=(snapshot, began), name=f"checkpoint-{step}", daemon=True
            )
            blocked = time.perf_counter() - began  # the training waited for the previous save and the copy
            self._in_flight.start()
            if self._checkpoints.rank == 0:
                logger.info("checkpoint step_%d: training went on after %.3f s", step, blocked)
        else:
            snapshot = take_snapshot(step, state)
            with track_collective(self._tracker, "checkpoint", device=_HOST):
                self._write_snapshot(snapshot, began)
        if durable:
            self._join()
            self._raise_failure()
        else:
            self.poll()

    def wait(self) -> None:
        """Waits for the save in flight. A save that could not be written is reported in the log.

        Raises:
            MoeDistError: the save failed with another error.
        """
        self._join()
        self.poll()

    def poll(self) -> None:
        """Reports the last save like `wait`, or does nothing while a save is in flight. The training polls after each
        step."""
        if self._failure is None or self.in_flight:
            return
        try:
            self._raise_failure()
        except CheckpointError as error:
            logger.error("%s; training continues, the next interval tries again", error)

    def _join(self) -> None:
        if self._in_flight is not None:
            with track_collective(self._tracker, "checkpoint", device=_HOST):
                self._in_flight.join()  # waits for the rest of the write; the watchdog counts this time
            self._in_flight = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_snapshot(self, snapshot: Snapshot, began: float) -> None:
        try:
            path = self._checkpoints.write(snapshot)  # collective over the thread's own group
        except Exception as error:  # raised by the next `poll` or `wait` in the training thread
            self._failure = error
            return
        if self._checkpoints.rank == 0:
            seconds, own = time.perf_counter() - began, snapshot.nbytes / 1e6
            logger.info("checkpoint %s: durable after %.3f s (%.1f MB of it from rank 0)", path.name, seconds, own)
            self._report(seconds)
