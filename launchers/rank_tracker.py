"""Tracks how the ranks of an attempt (start of the run) end, and which rank is at fault. Callers pass events and times."""

import signal
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from launchers.restart import is_final
from moe_dist.errors import EXIT_DONE, StoppedError
from moe_dist.runtime.signals import StopSignals
from moe_dist.runtime.status import AttemptRecord

CLEAN = (EXIT_DONE, StoppedError.exit_code)
ABORTED = 128 + signal.SIGINT
# A rank killed by one of these signals cannot log a reason. Unlike SIGABRT, these signals are not caused by another rank's
# failure.
SUDDEN = tuple(-number for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE))
# After a rank has stopped, the ranks that still run this many seconds later get SIGTERM. Closing a run can take 60 s: 30 s
# for the sinks, then 30 s for the trace.
LATE_SECONDS = 60.0
LINGER_SECONDS = 300.0  # seconds from the first success of a rank until ranks that still run are killed


@dataclass(frozen=True)
class ShutdownTimeouts:
    """Time limits for the end of the ranks, in seconds.

    Attributes:
        stop: Time from a stop signal until ranks that still run are killed.
        peers: Time from the first failure until the other ranks get SIGTERM. Meanwhile these ranks log their errors.
        kill: Time from this SIGTERM until ranks that still run are killed.
    """

    stop: float
    peers: float = 2.0
    kill: float = 4.0


@dataclass(frozen=True)
class Outcome:
    """How the ranks of an attempt ended, as their launcher observed it.

    Attributes:
        codes: Exit code of each rank; a negative code is the signal that killed the rank.
        failed: Ranks in the order in which they failed, except ranks that the launcher killed.
        stop: The first stop signal that the launcher got, or SIGTERM if a rank stopped on a signal that the launcher did
            not send.
        aborted: True if a second Ctrl-C killed the ranks.
        frozen: Ranks that were suspended by SIGSTOP when the first rank failed.
        lost: A description for each rank that died with its node or its Ray worker. Its exit code is SIGKILL's.
        words: For a rank, the system's message about its end, such as that a memory limit killed the rank.
        hosts: Address of each rank's node; empty if all ranks are on this machine.
        launched: Exit code of the program that started the ranks; used only if no rank failed.
    """

    codes: tuple[int, ...]
    failed: tuple[int, ...] = ()
    stop: signal.Signals | None = None
    aborted: bool = False
    frozen: tuple[int, ...] = ()
    lost: Mapping[int, str] = field(default_factory=dict)
    words: Mapping[int, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    launched: int = EXIT_DONE

    def cause(self, told: Collection[int] = (), record: AttemptRecord | None = None) -> int | None:
        """Returns the rank at fault; None if no rank is at fault, or if the rank at fault is unknown. All launchers blame
        the node of this rank. The first of these rules that names a rank decides:

        1. A rank lost with its node.
        2. A rank killed by a signal, unless the record or a rank that failed earlier shows an error that would repeat.
        3. A rank that SIGSTOP suspended.
        4. If `told` has ranks, a rank that failed and is not in `told`. The ranks in `told` only report a lost connection.
        5. The rank in the record. Its error is the recorded reason, or it did not enter a collective.
        6. If a record names no rank and a rank failed: a rank that is not in `told` and aborted or had exit code 0.
           Without a record: the rank that failed first.

        Args:
            told: Ranks that reported their own end: they were done, stopped on request, or printed an error.
        """
        repeats = record is not None and is_final(record.verdict or 0)
        before = takewhile(lambda rank: not is_final(self.codes[rank]), self.failed)
        dead = [] if repeats else [rank for rank in before if self.codes[rank] in SUDDEN]
        mute = [rank for rank in self.failed if self.codes[rank] > 0 and rank not in told] if told else []
        gone = [rank for rank, code in enumerate(self.codes) if code in (0, -signal.SIGABRT) and rank not in told]
        recorded = [record.rank] if record is not None and record.rank is not None else []
        last = self.failed if record is None or not self.failed else gone
        rules = (self.lost, dead, self.frozen, mute, recorded, last)
        return next((rank for ranks in rules for rank in ranks), None)

    @property
    def unready(self) -> bool:
        """True if the stop signal killed the first failed rank, because it had not yet installed its signal handlers."""
        return bool(self.failed) and self.stop is not None and self.codes[self.failed[0]] == -self.stop

    def exit_code(self, cause: int | None) -> int:
        """Returns the shell exit code of the rank `cause`; if `cause` is None, the largest code of all ranks and their
        launcher."""
        if self.aborted:
            return ABORTED
        if self.unready:
            return StoppedError.exit_code
        shell_codes = [128 - code if code < 0 else code for code in self.codes]
        return max([*shell_codes, self.launched]) if cause is None else shell_codes[cause]


class RankTracker:
    """Decides which signals the ranks of an attempt get at which times, and which ranks failed by themselves.

    The caller reports each event with its time (seconds of a monotonic clock), and sends the signals itself.
    """

    def __init__(self, num_ranks: int, timeouts: ShutdownTimeouts, say: Callable[[str], None]) -> None:
        self.codes: dict[int, int] = {}
        self._num_ranks, self._timeouts, self._say = num_ranks, timeouts, say
        self._failed: list[int] = []
        self._frozen: tuple[int, ...] = ()
        self._lost, self._words = dict[int, str](), dict[int, str]()
        self._terminate_at = self._kill_at = float("inf")
        self._stopping = self._aborted = False
        self._stopped = False  # whether a rank has stopped on a signal that this launcher did not send
        self._terminated = False  # whether SIGTERM was sent to the other ranks after a rank's failure or stop

    @property
    def over(self) -> bool:
        return len(self.codes) == self._num_ranks

    @property
    def failed(self) -> bool:
        """True if a rank has failed by itself, without being killed by the launcher."""
        return bool(self._failed)

    def end(
        self, rank: int, code: int, now: float, *, frozen: Callable[[], tuple[int, ...]], lost: str = "", words: str = ""
    ) -> None:
        """Reports that a rank has ended.

        Args:
            frozen: Returns the ranks suspended by SIGSTOP; called at the first failure.
            lost: A description if the rank's node or Ray worker is gone; empty if the process ended by itself.
            words: The system's message about the end, such as the memory limit that killed the rank.
        """
        self.codes[rank] = code
        if words:
            self._words[rank] = words
        if lost:
            self._lost[rank] = lost
        if code in CLEAN:
            self._kill_at = min(self._kill_at, now + LINGER_SECONDS)
            if code == StoppedError.exit_code and not (self._terminated or self._stopping):
                # A rank that starts after rank 0 has stopped would otherwise wait parallel.start_seconds for rank 0.
                self._stopped = True
                self._terminate_at = min(self._terminate_at, now + LATE_SECONDS)
        elif lost or self._kill_at > now:  # a rank that the launcher killed for a timeout has not failed by itself
            if not self._failed:
                self._frozen = frozen()
                self._terminate_at = now + self._timeouts.peers
                self._kill_at = min(self._kill_at, self._terminate_at + self._timeouts.kill)
            self._failed.append(rank)

    def signals_due(self, signals: StopSignals, now: float) -> list[signal.Signals]:
        """Returns the signals that all running ranks must get now: the launcher's first stop signal, SIGTERM a while after
        a rank has failed or stopped, or SIGKILL after a timeout or a second Ctrl-C."""
        due: list[signal.Signals] = []
        if signals.first is not None and not self._stopping:
            again = "; Ctrl-C again ends now" if signals.first == signal.SIGINT else ""
            self._say(f"{signals.first.name}: saving, then stopping{again}")
            self._stopping, self._kill_at = True, min(self._kill_at, now + self._timeouts.stop)
            due.append(signals.first)
        if signals.interrupts > 1 and not self._aborted:
            self._aborted, self._kill_at = True, now
        if now >= self._terminate_at:
            self._terminate_at, self._terminated = float("inf"), True
            if not self._failed:
                self._say("a rank has stopped on request; SIGTERM to the ranks that still run")
            due.append(signal.SIGTERM)
        return [*due, signal.SIGKILL] if now >= self._kill_at else due

    def outcome(self, stop: signal.Signals | None) -> Outcome:
        """Returns the outcome; all ranks must have ended."""
        codes = tuple(self.codes[rank] for rank in range(self._num_ranks))
        if stop is None and self._stopped:
            stop = signal.SIGTERM
        return Outcome(codes, tuple(self._failed), stop, self._aborted, self._frozen, self._lost, self._words)
