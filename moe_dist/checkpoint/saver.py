"""Saving while the training goes on: the state is copied on the step, and a thread writes the copy.

What keeps it from harm:
- The thread's votes go over a process group of its own. Gloo matches the calls of a group in the order in which they are
  made; only this thread uses the group while a save is in flight, so nothing of the training can come in between. The
  phases are the same on all ranks and each ends in a vote, so no rank waits for one that has given up.
- One save at most is in flight. The next one first waits for it.
- A save that failed is reported and moves nothing; the next interval tries again. The last save of a run, and that before a
  stop, is waited for.
- If the process ends in between, the partial folder is what any crash leaves.
"""

import logging
import threading
import time
from pathlib import Path

import torch

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.snapshot import HostBuffers, Snapshot, take_snapshot
from moe_dist.checkpoint.state import CheckpointState
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.errors import CheckpointError

logger = logging.getLogger(__name__)

_HOST = torch.device("cpu")


class Saver:
    """Saves the states of one rank; all methods but `poll` are collective.

    Args:
        checkpoints: Of the run; its process group is used by nothing else.
        asynchronous: Whether saves that need not be durable at once are written by a thread. It takes host memory for what
            this rank writes. Else the training waits for each, and nothing is copied.
        tracker: For the watchdog: the training waiting for a save counts as a collective.
    """

    def __init__(
        self, checkpoints: CheckpointManager, *, asynchronous: bool, tracker: CollectiveTracker | None = None
    ) -> None:
        self._checkpoints, self._asynchronous, self._watch = checkpoints, asynchronous, tracker
        self._buffers = HostBuffers()
        self._in_flight: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written on this rank at this moment."""
        return self._in_flight is not None and self._in_flight.is_alive()

    def save(self, step: int, state: CheckpointState, *, durable: bool) -> None:
        """Saves a state. Waits for the save in flight first.

        Args:
            durable: Return when it is committed, and fail if it cannot be; else a failure to write is reported later, in
                the log, and does not end the run.

        Raises:
            CheckpointError: a durable one could not be written.
            MoeDistError: this one or the one in flight failed of what trying again does not mend, as a lost lease.
        """
        began = time.perf_counter()
        self.wait()
        if self._asynchronous:
            snapshot = take_snapshot(step, state, self._buffers)
            self._in_flight = threading.Thread(
                target=self._write, args=(snapshot, began), name=f"checkpoint-{step}", daemon=True
            )
            blocked = time.perf_counter() - began
            self._in_flight.start()
            if self._checkpoints.rank == 0:
                logger.info("checkpoint step_%d: training went on after %.3f s", step, blocked)
        else:
            snapshot = take_snapshot(step, state)
            with track_collective(self._watch, "checkpoint", device=_HOST):
                self._write(snapshot, began)
        if durable:
            self._join()
            self._raise_failure()
        else:
            self.poll()

    def wait(self) -> None:
        """Returns when nothing is in flight. A save that could not be written is reported in the log.

        Raises:
            MoeDistError: it failed of something else.
        """
        self._join()
        self.poll()

    def poll(self) -> None:
        """The same without waiting: to be called now and then, costs nothing."""
        if self._failure is None or self.in_flight:
            return
        try:
            self._raise_failure()
        except CheckpointError as error:
            logger.error("%s; training goes on, the next interval tries again", error)

    def _join(self) -> None:
        if self._in_flight is not None:
            with track_collective(self._watch, "checkpoint", device=_HOST):
                self._in_flight.join()
            self._in_flight = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, snapshot: Snapshot, began: float) -> None:
        try:
            path = self._checkpoints.write(snapshot)
        except Exception as error:  # told by whoever asks next, on the thread that trains
            self._failure = error
            return
        if self._checkpoints.rank == 0:
            _report(path, snapshot, time.perf_counter() - began)


def _report(path: Path, snapshot: Snapshot, seconds: float) -> None:
    own = snapshot.nbytes / 1e6
    logger.info("checkpoint %s: durable after %.3f s (%.1f MB of it from rank 0)", path.name, seconds, own)
