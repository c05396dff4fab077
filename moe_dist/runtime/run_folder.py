"""A run on disk: what was asked for, what ran, how each attempt ended; and whether a new start goes on with it.

    config.yaml, provenance.json, diff_*.patch    resolved configuration; commit, dirty diff and packages of each attempt
    metrics.jsonl, tensorboard/, checkpoints/, log/rank_R.log, summary.txt
    status.json, lease.json                       verdict of each attempt; who writes here now
    slurm/                                        code and configuration that each Slurm job runs (launchers/snapshot.py)

Rank 0 of an attempt opens the folder; the other ranks only look (`inspect`), before any process group is made.
"""

import contextlib
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

from moe_dist.config.load import changes_on_resume, load_config, resolved_yaml
from moe_dist.config.schema import MAY_CHANGE_ON_RESUME, Config
from moe_dist.errors import EXIT_DONE, ConfigError, MoeDistError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.lease import WAIT_SECONDS, Holder, Lease, LeaseError, read_holder
from moe_dist.runtime.ownership import give_to_group, in_words, other_owner, refuse_planted_links
from moe_dist.runtime.provenance import record_provenance
from moe_dist.runtime.status import AttemptRecord, Status, read_status, write_status

BEFORE_OPENING = frozenset(
    {"log", "slurm", "lease.json", "status.json"}
)  # what may lie in a folder that no attempt has opened yet


class Start(Enum):
    """What a start with a configuration would do."""

    NEW = "new"
    RESUME = "resume"
    FINISHED = "finished"


class RunFolder:
    """The folder of one run.

    Args:
        path: <run.root>/<run.name>.
        group: Unix group that is given what is made; None leaves that to the system.
    """

    def __init__(self, path: str | Path, group: str | None = None) -> None:
        self.path, self._group = Path(path), group
        self.config_yaml = self.path / "config.yaml"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "log"
        self.status_json = self.path / "status.json"
        self.lease_json = self.path / "lease.json"
        self.summary_txt = self.path / "summary.txt"

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder that a configuration names; it need not exist."""
        return cls(Path(config.run.root) / config.run.name, config.run.group)

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def inspect(self, config: Config) -> Start:
        """What a start with `config` would do here. Reads only, so every rank may ask.

        Raises:
            ConfigError: the folder holds another configuration (with the difference), or something that is no run; or it
                belongs to another user, whose finished run can still be shown; or this user cannot read it.
            DataError: its status.json is damaged.
            RunFolderError: it cannot be read just now.
        """
        with in_words(self.path):
            owner = other_owner(self.path)
            if owner is None:
                start = self._inspect(config)
                refuse_planted_links(self.path)
                return start
            with contextlib.suppress(OSError, MoeDistError):
                if self._inspect(config) is Start.FINISHED:
                    return Start.FINISHED
        raise ConfigError(
            f"run.name={config.run.name!r}: {self.path} belongs to {owner}; you may look at what you can read of it, but a "
            "run is written by its owner alone: choose another run.name or run.root"
        )

    def _inspect(self, config: Config) -> Start:
        if not self.config_yaml.is_file():
            self._refuse_strangers()
            return Start.NEW
        if changes := changes_on_resume(self.read_config(), config):
            raise ConfigError(
                [
                    f"run.name={config.run.name!r}: {self.path} holds a run with another configuration; choose another "
                    "run.name, or start with --overwrite to move it aside (what may change on resume: "
                    f"{', '.join(MAY_CHANGE_ON_RESUME)})",
                    *(f"{key}: {old!r} in the folder, {new!r} now" for key, old, new in changes),
                ]
            )
        return Start.FINISHED if self.finished(config) else Start.RESUME

    def start(self, config: Config, env: RankEnv, *, overwrite: bool = False) -> Start:
        """Decides how a rank starts, before there is a process group: all ranks decide alike. With `overwrite` rank 0 moves
        the folder aside; in a restart that is ignored, or it would throw away what the job has done so far.

        Raises:
            ConfigError: as `inspect` and `move_aside`.
            LeaseError: as `move_aside`.
        """
        if not overwrite or env.attempt > 0:
            return self.inspect(config)
        if env.rank == 0:
            self.move_aside()
        return Start.NEW

    def finished(self, config: Config) -> bool:
        """Whether the run has reached the last step that `config` asks for."""
        latest = self.read_status().latest
        return latest is not None and latest.verdict == EXIT_DONE and latest.last_step >= config.train.steps

    def read_config(self) -> Config:
        """The configuration of the latest attempt.

        Raises:
            ConfigError: it cannot be read by this version of the code.
        """
        try:
            return load_config(self.config_yaml)
        except ConfigError as error:
            raise ConfigError(
                [
                    f"{self.config_yaml}: cannot be read by this version of moe_dist; go on with the version in "
                    "provenance.json, choose another run.name, or start with --overwrite",
                    *error.problems,
                ]
            ) from error

    def move_aside(self) -> Path | None:
        """For --overwrite: renames the folder to <name>.old-1 (or -2, ...). None where there is no run to move.

        Raises:
            LeaseError: an attempt writes to it at this moment.
            ConfigError: it is no run, or another user's.
        """
        with in_words(self.path):
            return self._move_aside()

    def _move_aside(self) -> Path | None:
        if not self.config_yaml.is_file():
            self._refuse_strangers()
            return None
        if owner := other_owner(self.path):
            raise ConfigError(f"--overwrite: {self.path} belongs to {owner}; choose another run.name or run.root")
        lease = Lease(self.lease_json, f"overwrite-{uuid.uuid4().hex[:8]}").acquire(wait_seconds=0.0)
        try:
            taken = {entry.name for entry in self.path.parent.iterdir()}
            name = next(n for k in itertools.count(1) if (n := f"{self.path.name}.old-{k}") not in taken)
            old = self.path.rename(self.path.with_name(name))
            (old / self.lease_json.name).unlink(missing_ok=True)
        finally:
            lease.release()
        return old

    def put_back(self, old: Path) -> None:
        """Undoes `move_aside` where no attempt has opened the new folder: the job that was to was refused."""
        with in_words(self.path):
            if self.path.exists():
                if {entry.name for entry in self.path.iterdir()} - BEFORE_OPENING:
                    return
                shutil.rmtree(self.path)
            old.rename(self.path)

    def prepare(self) -> None:
        """Makes the folder and its logs, and gives them to `run.group`. Who starts a run calls it after `inspect`.

        Raises:
            ConfigError, RunFolderError: this user may not make it, or cannot just now.
        """
        with in_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.logs, self.checkpoints, self.tensorboard):
                if self._group is not None and folder.is_dir():
                    give_to_group(folder, self._group)
            self.logs.mkdir(exist_ok=True)  # after its parent has the setgid bit, which it takes on

    def open(
        self,
        config: Config,
        env: RankEnv,
        *,
        wait_seconds: float = WAIT_SECONDS,
        on_wait: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Lease:
        """On rank 0: takes the lease, writes configuration and provenance, and begins the attempt in status.json.

        Args:
            on_wait, stopped: As in `Lease.acquire`.

        Returns:
            The lease, to be checked before each commit and released at the end.

        Raises:
            ConfigError, DataError, RunFolderError: as `inspect` and `prepare`.
            LeaseError: another attempt writes here and did not leave within `wait_seconds`.
            StoppedError: asked to stop while waiting.
        """
        self.inspect(config)
        with in_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lease = Lease(self.lease_json, env.attempt_id).acquire(wait_seconds, on_wait=on_wait, stopped=stopped)
        try:
            self.inspect(config)  # again: the attempt we waited for may have changed the folder
            with in_words(self.path):
                # Before anything else: until it stands, a rank that looks at a folder with other things in it takes them
                # for somebody's own.
                write_atomically(self.config_yaml, resolved_yaml(config))
            self.prepare()
            with in_words(self.path):
                self.checkpoints.mkdir(exist_ok=True)
                record_provenance(self.path, env.attempt_id)
                self._begin(env, lease)
        except BaseException:
            lease.release()
            raise
        return lease

    def read_status(self) -> Status:
        """All attempts; empty where none has begun.

        Raises:
            DataError: status.json is damaged.
        """
        return read_status(self.status_json)

    def last_step(self) -> int:
        """Last step that an attempt reported; 0 before the first."""
        latest = self.read_status().latest
        return latest.last_step if latest is not None else 0

    def has_verdict(self, attempt_id: str) -> bool:
        """Whether a rank of this attempt has said how it ended."""
        return self._claim(attempt_id).exists()

    def write_status(self, *, verdict: int, reason: str, last_step: int, attempt_id: str, rank: int = 0) -> bool:
        """Writes how an attempt ended. Any rank may: the first to do so gives the verdict, since a rank that fails writes
        before it leaves, and its peers fail only after that.

        Returns:
            Whether it was written; False where the attempt has its verdict already, or no longer holds the lease.
        """
        if not self._is_held_by(attempt_id):
            return False
        try:
            os.close(os.open(self._claim(attempt_id), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # the file server
        except FileExistsError:  # decides, not a cache
            return False
        ending = self.read_status().of(attempt_id)
        if ending is None:
            return False

        def check() -> None:
            # Rank 0 may have given the lease back meanwhile, since this rank has the claim; but nobody else may have come.
            writer = read_holder(self.lease_json) or self.read_status().latest
            if writer is None or writer.attempt_id != attempt_id:
                raise LeaseError(f"{self.path}: another attempt writes here now")

        try:
            write_status(
                self.status_json,
                replace(ending, verdict=verdict, reason=reason, last_step=last_step, rank=rank, ended=time.time()),
                before_rename=check,
            )
        except LeaseError:
            return False
        return True

    def amend_status(self, attempt_id: str, *, verdict: int, reason: str, rank: int | None, last_step: int) -> bool:
        """For a launcher, once every rank of the attempt has ended and it has seen why: what a peer of a killed or frozen
        rank wrote down is a consequence, and where all were killed nobody wrote anything.

        Returns:
            Whether it was written; False where the attempt never began, or somebody else writes to the run by now.
        """
        try:
            lease = Lease(self.lease_json, attempt_id).acquire(wait_seconds=0.0)
        except LeaseError:
            return False
        try:
            ending = self.read_status().of(attempt_id)
            if ending is None:
                return False
            ended = ending.ended or time.time()
            amended = replace(ending, verdict=verdict, reason=reason, rank=rank, last_step=last_step, ended=ended)
            write_status(self.status_json, amended, before_rename=lease.check)
        finally:
            lease.release()
        return True

    def write_summary(self, text: str) -> None:
        """Keeps the summary, to be shown when a finished run is started again."""
        write_atomically(self.summary_txt, text)

    def read_summary(self) -> str:
        """The summary of a finished run, or a line that says how it ended."""
        if self.summary_txt.is_file():
            return self.summary_txt.read_text()
        latest = self.read_status().latest
        return f"{self.path}: {'no attempt has begun' if latest is None else f'done after step {latest.last_step}'}"

    def _begin(self, env: RankEnv, lease: Lease) -> None:
        me = Holder.this_process(env.attempt_id)
        for claim in self.path.glob(".verdict_*"):
            claim.unlink(missing_ok=True)
        ending = AttemptRecord(env.attempt_id, env.attempt, me.host, me.pid, time.time(), last_step=self.last_step())
        write_status(self.status_json, ending, before_rename=lease.check)

    def _claim(self, attempt_id: str) -> Path:
        return self.path / f".verdict_{attempt_id}"

    def _is_held_by(self, attempt_id: str) -> bool:
        holder = read_holder(self.lease_json)
        return holder is not None and holder.attempt_id == attempt_id

    def _refuse_strangers(self) -> None:
        """A folder that is not empty and no run is somebody's own: nothing is written into it and it is not moved."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.name={self.path.name!r}: {self.path} is a file; choose another run.name or run.root")
        strangers = sorted(
            entry.name
            for entry in self.path.iterdir()
            if not (entry.name in BEFORE_OPENING or entry.name.startswith((".", "lease.json.")))
        )
        if strangers:
            raise ConfigError(
                f"run.name={self.path.name!r}: {self.path} is no run (no config.yaml, but {', '.join(strangers[:5])}); "
                "choose another run.name or run.root"
            )
