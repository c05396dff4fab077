"""The folder of a run: its files, its state before a start, and its record of each attempt. It contains:

    config.yaml, provenance.json, diff_*.patch    resolved configuration; commit, diff and packages of each attempt
    metrics.jsonl, tensorboard/, checkpoints/, log/rank_R.log, summary.txt, report.html
    status.json, lease.json                       verdict of each attempt; the current writer
    slurm/                                        code and configuration of each Slurm job (launchers/snapshot.py)

Only rank 0 opens the folder (`open`). All other ranks only read it, before the process group is created (`inspect`).
"""

import contextlib
import itertools
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path

from moe_dist.config.load import changes_on_resume, load_stored_config, resolved_yaml
from moe_dist.config.regular_file import read_regular
from moe_dist.config.schema import MAY_CHANGE_ON_RESUME, Config
from moe_dist.config.stored_format import FORMER_DEFAULTS
from moe_dist.errors import EXIT_DONE, ConfigError, MoeDistError, printable
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import lines_from_end, write_atomically
from moe_dist.runtime.hints import RecordedHint, read_hints
from moe_dist.runtime.lease import WAIT_SECONDS, Holder, Lease, LeaseError, read_holder
from moe_dist.runtime.ownership import give_to_group, in_words, other_owner, refuse_planted_files
from moe_dist.runtime.provenance import record_provenance
from moe_dist.runtime.status import AttemptRecord, Status, read_status, write_status

# Names that may exist before the first attempt.
BEFORE_OPENING = frozenset({"log", "slurm", "lease.json", "status.json", "evaluations"})


class Start(Enum):
    """The kinds of start: begin a run, resume it, or only print the summary of a finished run."""

    NEW = "new"
    RESUME = "resume"
    FINISHED = "finished"


class RunFolder:
    """The folder of one run.

    Args:
        path: <run.root>/<run.name>.
        group: Unix group of the folder's files; None keeps the system's default group.
    """

    def __init__(self, path: str | Path, group: str | None = None) -> None:
        self.path, self._group = Path(path), group
        self.config_yaml = self.path / "config.yaml"
        self.metrics_jsonl = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.trace = self.path / "trace"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "log"
        self.status_json = self.path / "status.json"
        self.lease_json = self.path / "lease.json"
        self.summary_txt = self.path / "summary.txt"
        self.compute_map_png = self.path / "compute_map.png"

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """Returns the run folder of a configuration; the folder need not exist."""
        return cls(Path(config.run.root) / config.run.name, config.run.group)

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def inspect(self, config: Config) -> Start:
        """Returns the kind of start with `config`. This method only reads files, so that every rank may call it.

        Raises:
            ConfigError: the folder contains a run with a different configuration, or is no run folder; or it belongs to
                another user and its run is not finished; or this user cannot read it.
            DataError: status.json is damaged.
            RunFolderError: the folder cannot be read at the moment.
        """
        with in_words(self.path):
            owner = other_owner(self.path)
            if owner is None:
                refuse_planted_files(self.path)  # called before any file is read
                return self._inspect(config)
            with contextlib.suppress(OSError, MoeDistError):
                if self._inspect(config) is Start.FINISHED:  # reading a summary needs no ownership
                    return Start.FINISHED
        raise ConfigError(
            f"run.name={config.run.name!r}: {self.path} belongs to {owner}, and only the owner may continue a run; choose "
            "another run.name or run.root"
        )

    def _inspect(self, config: Config) -> Start:
        if not self.config_yaml.exists():
            self._refuse_strangers()
            if config.run.init_from is not None and not Path(config.run.init_from).exists():
                raise ConfigError(
                    f"run.init_from={config.run.init_from!r}: no such folder; give a run folder, an import, or a folder of "
                    "checkpoints, or set it to null"
                )
            return Start.NEW
        if changes := changes_on_resume(self.read_config(), config):
            raise ConfigError(
                [
                    f"run.name={config.run.name!r}: {self.path} holds a run with another configuration; choose another "
                    "run.name, or start with --overwrite, which renames the old run's folder (keys that may change on "
                    f"resume: {', '.join(MAY_CHANGE_ON_RESUME)})",
                    *(f"{key}: {old!r} in the folder, {new!r} now{_way_on(key, old)}" for key, old, new in changes),
                ]
            )
        return Start.FINISHED if self.finished(config) else Start.RESUME

    def start(self, config: Config, env: RankEnv, *, overwrite: bool = False) -> Start:
        """Returns the kind of start, before the process group exists. All ranks get the same result. With `overwrite`, rank
        0 first renames the old run's folder. Raises the errors of `inspect` and `move_aside`."""
        if not overwrite or env.attempt > 0:  # a restarted attempt must not rename its own run's folder
            return self.inspect(config)
        if env.rank == 0:
            self.move_aside()
        return Start.NEW

    def finished(self, config: Config) -> bool:
        """Returns True if the run has completed `train.steps` steps."""
        latest = self.read_status().latest
        return latest is not None and latest.verdict == EXIT_DONE and latest.last_step >= config.train.steps

    def read_config(self) -> Config:
        """Returns the configuration of the latest attempt. Raises ConfigError if this version cannot read it."""
        try:
            return load_stored_config(self.config_yaml)
        except ConfigError as error:
            raise ConfigError(
                [
                    f"{self.config_yaml}: this version of moe_dist cannot read it; use the version in provenance.json, "
                    "choose another run.name, or start with --overwrite",
                    *error.problems,
                ]
            ) from error

    def move_aside(self) -> Path | None:
        """Renames the folder to <name>.old-1 (or -2, ...) for --overwrite. Returns the new path; None if there is no run.

        Raises:
            LeaseError: an attempt is writing to the folder.
            ConfigError: the folder is no run folder, or belongs to another user.
        """
        with in_words(self.path):
            if not self.config_yaml.exists():
                self._refuse_strangers()
                return None
            if owner := other_owner(self.path):
                raise ConfigError(f"--overwrite: {self.path} belongs to {owner}; choose another run.name or run.root")
            lease = Lease(self.lease_json, f"overwrite-{uuid.uuid4().hex[:8]}").acquire(wait_seconds=0.0)
            try:  # no attempt is writing, because the lease was free
                taken = {entry.name for entry in self.path.parent.iterdir()}
                name = next(n for k in itertools.count(1) if (n := f"{self.path.name}.old-{k}") not in taken)
                old = self.path.rename(self.path.with_name(name))  # atomic; nothing is copied or deleted
                (old / self.lease_json.name).unlink(missing_ok=True)  # the lease moved with the folder
            finally:
                lease.release()
            return old

    def put_back(self, old: Path) -> None:
        """Undoes `move_aside` if the job was refused, unless an attempt has already opened the new folder."""
        with in_words(self.path):
            if self.path.exists():
                if {entry.name for entry in self.path.iterdir()} - BEFORE_OPENING:  # an attempt has begun
                    return
                shutil.rmtree(self.path)
            old.rename(self.path)

    def prepare(self) -> None:
        """Creates the folder and its log folder, and sets their group to `run.group`. Launchers call this after `inspect`.
        Raises ConfigError or RunFolderError if the folders cannot be created or changed."""
        with in_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.logs, self.checkpoints, self.tensorboard):
                if self._group is not None and folder.is_dir():
                    give_to_group(folder, self._group)
            self.logs.mkdir(exist_ok=True)  # created after its parent has the setgid bit, which new folders inherit

    def open(
        self,
        config: Config,
        env: RankEnv,
        *,
        wait_seconds: float = WAIT_SECONDS,
        on_wait: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Lease:
        """Takes the lease, writes configuration and provenance, and adds the attempt to status.json. Only rank 0 calls it.
        The caller must check the returned lease before each commit, and release it at the end. The arguments are those of
        `Lease.acquire`.

        Raises:
            ConfigError, DataError, RunFolderError: raised by `inspect` or `prepare`.
            LeaseError: another attempt writes to the run, and has not ended within `wait_seconds`.
            StoppedError: a stop signal came during the wait.
        """
        self.inspect(config)
        with in_words(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lease = Lease(self.lease_json, env.attempt_id).acquire(wait_seconds, on_wait=on_wait, stopped=stopped)
        try:
            self.inspect(config)  # inspected again, because an attempt that held the lease may have changed the folder
            with in_words(self.path):
                # config.yaml comes first, because without it another rank's `inspect` would find no run folder.
                write_atomically(self.config_yaml, resolved_yaml(config))
            self.prepare()
            with in_words(self.path):
                self.checkpoints.mkdir(exist_ok=True)
                record_provenance(self.path, env.attempt_id)  # runs a few git commands
                self._begin(env, lease)
        except BaseException:
            lease.release()
            raise
        return lease

    def read_status(self) -> Status:
        """Returns all attempts; empty if there are none yet. Raises DataError if status.json is damaged."""
        return read_status(self.status_json)

    def last_step(self) -> int:
        """Returns the last step in status.json or metrics.jsonl; 0 if there was no step yet. If an attempt was killed, only
        metrics.jsonl has its last step."""
        latest = self.read_status().latest
        return max(latest.last_step if latest is not None else 0, self._recorded_step())

    def _recorded_step(self) -> int:
        for line in lines_from_end(self.metrics_jsonl, most_bytes=1 << 20):  # usually reads one block of 64 KB
            if found := re.match(rb'\{"step":(\d{1,18}),', line):
                return int(found[1])
        return 0

    def hints(self) -> tuple[RecordedHint, ...]:
        """Returns the last hint of each kind, in the order of their steps."""
        return read_hints(self.metrics_jsonl)

    def has_verdict(self, attempt_id: str) -> bool:
        """Returns True if a rank of this attempt has recorded a verdict."""
        return self._claim(attempt_id).exists()

    def write_status(
        self, *, verdict: int, reason: str, last_step: int, attempt_id: str, rank: int | None = 0, rank_host: str = ""
    ) -> bool:
        """Records the end of an attempt. Every rank may call this method, but only the first call counts: a failed rank
        records its verdict before its exit can make another rank fail. Returns False, and writes nothing, if the attempt
        already has a verdict or has lost the lease. `rank` is the rank at fault."""
        holder = read_holder(self.lease_json)
        if holder is None or holder.attempt_id != attempt_id:
            return False
        try:
            # With O_EXCL the file server decides which rank is first. A client's cache could be outdated.
            claim = os.open(self._claim(attempt_id), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            now = os.fstat(claim).st_mtime
            os.close(claim)
        except FileExistsError:
            return False
        record = self.read_status().of(attempt_id)
        if record is None:
            return False

        def check() -> None:
            # Rank 0 may have released the lease by now, but no other attempt may have taken it.
            writer = read_holder(self.lease_json) or self.read_status().latest
            if writer is None or writer.attempt_id != attempt_id:
                raise LeaseError(f"{self.path}: another attempt now writes to this run")

        try:
            ended = replace(record, verdict=verdict, reason=reason, last_step=last_step, ended=now)
            ended = replace(ended, rank=rank, rank_host=rank_host)
            write_status(self.status_json, ended, before_rename=check)
        except LeaseError:
            return False
        return True

    def amend_status(
        self,
        attempt_id: str,
        *,
        verdict: int,
        reason: str,
        rank: int | None,
        last_step: int = 0,
        restarts: int = 0,
        lasted: float = 0.0,
        wait_seconds: float = 0.0,
    ) -> bool:
        """Replaces the recorded verdict. A launcher calls this method after all ranks have ended. If a rank was killed or
        froze, other ranks have recorded only a follow-up error; if all ranks were killed, there is no verdict. If rank 0
        ended before it opened the folder, this method adds the attempt, with its `restarts` and its duration in seconds
        (`lasted`). Waits up to `wait_seconds` until rank 0 has released the lease, or the lease is stale. Returns False,
        and writes nothing, if another attempt writes to the run."""
        try:
            lease = Lease(self.lease_json, attempt_id).acquire(wait_seconds)
        except LeaseError:
            return False
        try:
            now, me = self.lease_json.stat().st_mtime, Holder.this_process(attempt_id)
            never_opened = AttemptRecord(attempt_id, restarts, me.host, me.pid, now - lasted, last_step=self.last_step())
            record = self.read_status().of(attempt_id) or never_opened
            step = max(last_step, record.last_step, self._recorded_step())  # a killed attempt did not record its last step
            amended = replace(record, verdict=verdict, reason=reason, last_step=step, ended=record.ended or now)
            amended = replace(amended, rank=rank, rank_host="")
            write_status(self.status_json, amended, before_rename=lease.check)
        finally:
            lease.release()
        return True

    def write_summary(self, text: str) -> None:
        """Stores the summary, which a later start of the finished run prints."""
        write_atomically(self.summary_txt, text)

    def read_summary(self) -> str:
        """Returns the summary of a finished run. If no summary is stored, returns a line with the run's last step."""
        if self.summary_txt.is_file():
            return printable(read_regular(self.summary_txt, most_bytes=1 << 20, links=False).decode(errors="replace"))
        latest = self.read_status().latest
        return f"{self.path}: {'no attempt has begun' if latest is None else f'done after step {latest.last_step}'}"

    def finished_text(self, config: Config) -> str:
        """Returns the text that a start of a finished run prints. It is the run's summary or, if `config` has fewer steps
        than the run has completed, a sentence that says so."""
        latest = self.read_status().latest
        steps, done = config.train.steps, 0 if latest is None else latest.last_step
        if done <= steps:
            return self.read_summary()
        return (
            f"train.steps={steps}: {self.path} has already finished {done} steps, so there is nothing to do; to go on, set "
            f"train.steps above {done}; for another run, set another run.name, or start with --overwrite, which renames "
            "this run's folder"
        )

    def _begin(self, env: RankEnv, lease: Lease) -> None:
        me = Holder.this_process(env.attempt_id)
        for claim in (*self.path.glob(".verdict_*"), *self.path.glob(".told_*")):
            claim.unlink(missing_ok=True)  # files of earlier attempts, which have ended
        now = self.config_yaml.stat().st_mtime  # `open` has just written this file
        record = AttemptRecord(env.attempt_id, env.attempt, me.host, me.pid, now, last_step=self.last_step())
        write_status(self.status_json, record, before_rename=lease.check)

    def tell(self, attempt_id: str, rank: int) -> None:
        """Records that a rank ends by itself: its run is done, was stopped, or failed with an error that it printed."""
        with contextlib.suppress(OSError):  # raised if the disk is full
            (self.path / f".told_{attempt_id}_{rank}").touch()

    def told(self, attempt_id: str) -> frozenset[int]:
        """Returns the ranks that called `tell`. A rank that ended without this call was ended by a native exit, `os._exit`,
        a signal or a memory limit."""
        return frozenset(int(path.name.rpartition("_")[2]) for path in self.path.glob(f".told_{attempt_id}_*"))

    def _claim(self, attempt_id: str) -> Path:
        return self.path / f".verdict_{attempt_id}"

    def _refuse_strangers(self) -> None:
        """Raises ConfigError if the folder is no run folder but has other content, because a run must not change that."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.name={self.path.name!r}: {self.path} is a file; choose another run.name or run.root")
        names = {entry.name for entry in self.path.iterdir()} - BEFORE_OPENING
        if strangers := sorted(name for name in names if not name.startswith((".", "lease.json."))):
            raise ConfigError(
                f"run.name={self.path.name!r}: {self.path} is no run folder (it has no config.yaml, but "
                f"{', '.join(strangers[:5])}); choose another run.name or run.root"
            )


def _way_on(key: str, old: object) -> str:
    """Returns a text that says how to resume a run that began with a former default value; empty for any other value."""
    return f"; the default has changed: to resume this run, set {key}={old}" if FORMER_DEFAULTS.get(key) == old else ""
