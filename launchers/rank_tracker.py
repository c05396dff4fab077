"""Tracks the ends of an attempt's ranks and finds the one that failed first. Pure: callers pass events and the time."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_dist.errors import EXIT_DONE, StoppedError

CLEAN = (EXIT_DONE, StoppedError.exit_code)
ABORTED = 128 + signal.SIGINT
# A rank killed by one of these cannot log a reason, and no failed peer causes it (a failed peer can cause SIGABRT).
SUDDEN = tuple(-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
LINGER_SECONDS = 300.0  # from the first rank that ends successfully until ranks that still run are killed


@dataclass(frozen=True)
class ShutdownTimeouts:
    """Time limits in seconds.

    Attributes:
        stop: From a stop signal until ranks that still run are killed.
        peers: From the first failure until the other ranks get SIGTERM; they log their own errors in this time.
        kill: From that SIGTERM until they are killed.
    """

    stop: float
    peers: float = 2.0
    kill: float = 4.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        codes: Exit code of each rank; a negative one is the signal that killed it.
        first_failed: The rank that caused the failure; None if no rank failed by itself.
        stop: The first stop signal that the launcher got; None without one.
        aborted: A second Ctrl-C killed the ranks.
        frozen: Ranks that SIGSTOP had suspended when the first rank failed; the first of them is the cause.
        lost: For ranks that died with their node or their Ray worker, a description; their code is that of SIGKILL.
    """

    codes: tuple[int, ...]
    first_failed: int | None
    stop: signal.Signals | None
    aborted: bool
    frozen: tuple[int, ...] = ()
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """Whether the failed rank was killed or frozen. It could not record a reason, so status.json holds a peer's
        follow-up error."""
        return self.sudden or self.first_failed in self.frozen

    @property
    def sudden(self) -> bool:
        """Whether the failed rank was killed by a signal."""
        return self.first_failed is not None and self.codes[self.first_failed] in SUDDEN

    @property
    def exit_code(self) -> int:
        """Shell exit code: that of the rank that failed first; without a failure, the largest of all ranks."""
        if self.aborted:
            return ABORTED
        shell_codes = [128 - code if code < 0 else code for code in self.codes]
        return max(shell_codes) if self.first_failed is None else shell_codes[self.first_failed]


class RankTracker:
    """Decides when the ranks of an attempt get SIGTERM, when they are killed, and which rank caused the failure.

    The caller reports events with the seconds of a monotonic clock, and sends the signals itself.
    """

    def __init__(self, num_ranks: int, timeouts: ShutdownTimeouts) -> None:
        self.codes: dict[int, int] = {}
        self._num_ranks, self._timeouts = num_ranks, timeouts
        self._failed: list[int] = []  # in the order of failure; without ranks that the launcher killed
        self._frozen: tuple[int, ...] = ()
        self._lost: dict[int, str] = {}
        self._terminate_at = self._kill_at = float("inf")
        self._aborted = False

    @property
    def over(self) -> bool:
        return len(self.codes) == self._num_ranks

    @property
    def failed(self) -> bool:
        """Whether a rank has failed by itself."""
        return bool(self._failed)

    def end(self, rank: int, code: int, now: float, *, frozen: Callable[[], tuple[int, ...]], lost: str = "") -> None:
        """Reports that a rank has ended.

        Args:
            frozen: Returns the ranks suspended by SIGSTOP; called at the first failure.
            lost: Description if its node or Ray worker is gone; empty if the process ended by itself.
        """
        self.codes[rank] = code
        if lost:
            self._lost[rank] = lost
        if code in CLEAN:
            self._kill_at = min(self._kill_at, now + LINGER_SECONDS)
        elif lost or self._kill_at > now:  # a rank that the launcher killed for a timeout has not failed by itself
            if not self._failed:
                self._frozen = frozen()
                self._terminate_at = now + self._timeouts.peers
                self._kill_at = min(self._kill_at, self._terminate_at + self._timeouts.kill)
            self._failed.append(rank)

    def stop(self, now: float) -> None:
        """Reports that all ranks got the stop signal."""
        self._kill_at = min(self._kill_at, now + self._timeouts.stop)

    def abort(self, now: float) -> None:
        """Reports that the user wants all ranks killed immediately."""
        if not self._aborted:
            self._aborted, self._kill_at = True, now

    def must_terminate(self, now: float) -> bool:
        """Whether the peers of a failed rank must get SIGTERM now; True once."""
        due = now >= self._terminate_at
        if due:
            self._terminate_at = float("inf")
        return due

    def must_kill(self, now: float) -> bool:
        """Whether all ranks that still run must be killed now."""
        return now >= self._kill_at

    def outcome(self, stop: signal.Signals | None) -> Outcome:
        """The outcome once all ranks have ended. The cause is the first killed rank, else the first frozen one, else the
        first that failed."""
        killed = [rank for rank in self._failed if self.codes[rank] in SUDDEN]
        cause = next(iter([*killed, *self._frozen, *self._failed]), None)
        codes = tuple(self.codes[rank] for rank in range(self._num_ranks))
        return Outcome(codes, cause, stop, self._aborted, self._frozen, self._lost)
