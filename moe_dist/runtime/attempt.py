"""One start of a run on one rank. Every way out of it leaves a verdict: in status.json, and as the exit code.

with Attempt(env) as attempt:
    attempt.open(config)                      # rank 0: lease, configuration, status
    attempt.last_step = lambda: progress.step
    ...
sys.exit(attempt.exit_code)
"""

import contextlib
import errno
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, MoeDistError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import WAIT_SECONDS, Lease
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.secrets import without_secrets

CAUSE_SECONDS = 1.5  # within which a rank that heard of a peer's error lets the peer give the reason
STORAGE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)
)


def verdict_of(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of an exception that ends a run."""
    if isinstance(error, MoeDistError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return EXIT_FAILED, (
            f"{where}{os.strerror(error.errno)}; mend that (room, permissions, the file system of the run folder), then "
            "start again: the run goes on from its last checkpoint (docs/reliability.md)"
        )
    return EXIT_FAILED, f"{type(error).__name__}: {error}"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class Attempt:
    """Turns the end of the `with` body into a verdict.

    The body may end by an exception, which is shown (users' errors as their message, ours with a traceback) and does not
    leave the block: after it the process must end without another collective, for its peers may be gone. So a failed
    rank ends right here, by `os._exit`, and its closed connections tell the peers.

    Attributes:
        last_step: Where the run stands; set it once that is known.
        commit_needs: Called before each commit; raises where something else has to be on the disk first.
        exit_code: The verdict, after the block.
    """

    def __init__(self, env: RankEnv) -> None:
        self._env = env
        self._folder: RunFolder | None = None
        self._lease: Lease | None = None
        self.last_step: Callable[[], int] | None = None
        self.commit_needs: Callable[[], None] = lambda: None
        self.exit_code = EXIT_DONE

    def open(
        self, config: Config, *, wait_seconds: float = WAIT_SECONDS, stopped: Callable[[], bool] | None = None
    ) -> RunFolder:
        """The folder of the run, opened for writing on rank 0. Before the process group is made, so that no rank gets
        past the rendezvous in a folder that rank 0 may not have.

        Args:
            wait_seconds: How long rank 0 waits for another attempt to leave; it says so at once on standard error.
            stopped: Whether a stop was asked for, which ends that wait.

        Raises:
            ConfigError, DataError, LeaseError, RunFolderError, StoppedError: as `RunFolder.open`.
        """
        folder = RunFolder.of(config)
        if self._env.rank == 0:
            self._lease = folder.open(config, self._env, wait_seconds=wait_seconds, on_wait=_say, stopped=stopped)
        self._folder = folder
        return folder

    def check_lease(self) -> None:
        """Call right before each write to the run; on ranks other than 0 it does nothing.

        Raises:
            LeaseError: another attempt writes to this run now.
        """
        if self._lease is not None:
            self._lease.check()

    def check_commit(self) -> None:
        """Call right before each commit; on ranks other than 0 it does nothing.

        Raises:
            LeaseError: as `check_lease`.
            CheckpointError: what `commit_needs` waits for is not on the disk.
        """
        self.check_lease()
        self.commit_needs()

    def expire(self) -> None:
        """For the grace timer of `StopRequest`: leaves the verdict of a run that did not stop in time."""
        self._leave(EXIT_FAILED, "did not stop within the grace after a stop signal; what the last checkpoint has is safe")

    def give_up(self, reason: str) -> NoReturn:
        """For the watchdog's thread: leaves the verdict of a run whose main thread hangs, and ends the process here."""
        with contextlib.suppress(Exception):  # nobody else ends this process
            self._leave(EXIT_FAILED, reason)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{reason}\n")
        self._end(EXIT_FAILED)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            if self._env.rank == 0:
                self._leave(EXIT_DONE, "done")
            return
        self.exit_code, reason = verdict_of(error)
        reason = without_secrets(reason, os.environ)
        if isinstance(error, MoeDistError):
            sys.stderr.write(f"{reason}\n")
        else:
            sys.stderr.write(without_secrets("".join(traceback.format_exception(error)), os.environ))
        with contextlib.suppress(OSError, MoeDistError):  # a full disk must not hide the error; the exit code still tells
            self._let_the_cause_speak(error)
            self._leave(self.exit_code, reason)
        self._end(self.exit_code)

    @staticmethod
    def _end(code: int) -> NoReturn:
        logging.shutdown()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _let_the_cause_speak(self, error: BaseException) -> None:
        """Ranks that voted learn of an error at the same moment as the rank that has it: that one writes the verdict."""
        if self._folder is None or not (isinstance(error, MoeDistError) and error.consequence):
            return
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline and not self._folder.has_verdict(self._env.attempt_id):
            time.sleep(0.02)

    def _leave(self, verdict: int, reason: str) -> None:
        if self._folder is not None:
            last = self.last_step() if self.last_step is not None else self._folder.last_step()
            self._folder.write_status(
                verdict=verdict, reason=reason, last_step=last, attempt_id=self._env.attempt_id, rank=self._env.rank
            )
        if self._lease is not None:
            self._lease.release()
