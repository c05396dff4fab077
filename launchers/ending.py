"""How the ranks of an attempt end, and what was the cause: pure values and a clock that others read, for every launcher."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_dist.errors import EXIT_DONE, StoppedError

CLEAN = (EXIT_DONE, StoppedError.exit_code)
ABORTED = 128 + signal.SIGINT
# A rank that dies of one of these has said nothing, and does not die of a peer's failure (of SIGABRT it may).
SUDDEN = tuple(-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
LINGER_SECONDS = 300.0  # from the first rank that ends well until those that still run are ended


@dataclass(frozen=True)
class ShutdownTimeouts:
    """How long ranks may take, in seconds.

    Attributes:
        stop: From a stop signal to the end.
        peers: From a rank's failure until its peers are asked to end, so that they can say what they saw.
        kill: From then until they are killed.
    """

    stop: float
    peers: float = 2.0
    kill: float = 4.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        codes: Of each rank; negative is the signal that killed it.
        first_failed: The rank whose failure is the cause; None where none failed by itself.
        stop: The first stop signal that came, if any.
        aborted: Ended at once by a second Ctrl-C.
        frozen: Ranks that stood stopped (SIGSTOP) when the first failed; where there are any, the first is the cause.
        lost: Ranks that went with what held them (a node, a worker of Ray), in words; their code is that of SIGKILL.
    """

    codes: tuple[int, ...]
    first_failed: int | None
    stop: signal.Signals | None
    aborted: bool
    frozen: tuple[int, ...] = ()
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def silent(self) -> bool:
        """Whether the cause is a rank that could say nothing, being killed or frozen: what its peers wrote down is only a
        consequence."""
        return self.sudden or self.first_failed in self.frozen

    @property
    def sudden(self) -> bool:
        """Whether the cause is a rank that was killed."""
        return self.first_failed is not None and self.codes[self.first_failed] in SUDDEN

    @property
    def exit_code(self) -> int:
        """For a shell: that of the first failure; without one, the worst of the ranks."""
        if self.aborted:
            return ABORTED
        shell_codes = [128 - code if code < 0 else code for code in self.codes]
        return max(shell_codes) if self.first_failed is None else shell_codes[self.first_failed]


class RankTracker:
    """An attempt up to its last end: when ranks are asked to end, when they are killed, which of them was the cause.

    Is told what happens, with the seconds of a monotonic clock; does nothing to a rank itself.
    """

    def __init__(self, num_ranks: int, timeouts: ShutdownTimeouts) -> None:
        self.codes: dict[int, int] = {}
        self._num_ranks, self._patience = num_ranks, timeouts
        self._failed: list[int] = []  # in the order of their ends, before we ended any
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
        """A rank has ended.

        Args:
            frozen: Asked at the first failure: which ranks stand stopped.
            lost: What held it is gone, in words; empty where the rank ended by itself.
        """
        self.codes[rank] = code
        if lost:
            self._lost[rank] = lost
        if code in CLEAN:
            self._kill_at = min(self._kill_at, now + LINGER_SECONDS)
        elif lost or self._kill_at > now:  # what was killed for being late is no failure of its own
            if not self._failed:
                self._frozen = frozen()
                self._terminate_at = now + self._patience.peers
                self._kill_at = min(self._kill_at, self._terminate_at + self._patience.kill)
            self._failed.append(rank)

    def stop(self, now: float) -> None:
        """All ranks were asked to stop."""
        self._kill_at = min(self._kill_at, now + self._patience.stop)

    def abort(self, now: float) -> None:
        """Somebody wants the end at once."""
        if not self._aborted:
            self._aborted, self._kill_at = True, now

    def must_terminate(self, now: float) -> bool:
        """Whether the peers of a failed rank are to be asked to end, now; once."""
        due = now >= self._terminate_at
        if due:
            self._terminate_at = float("inf")
        return due

    def must_kill(self, now: float) -> bool:
        """Whether all that still run are to be killed."""
        return now >= self._kill_at

    def outcome(self, stop: signal.Signals | None) -> Outcome:
        """How it ended, once all have: the cause is a rank that was killed, else one that stood still, else the first."""
        killed = [rank for rank in self._failed if self.codes[rank] in SUDDEN]
        cause = next(iter([*killed, *self._frozen, *self._failed]), None)
        codes = tuple(self.codes[rank] for rank in range(self._num_ranks))
        return Outcome(codes, cause, stop, self._aborted, self._frozen, self._lost)
