"""A run on disk: what was asked for, what ran, how each attempt ended; and whether a new start goes on with it.

    config.yaml, provenance.json, diff_*.patch    resolved configuration; commit, dirty diff and packages of each attempt
    metrics.jsonl, tensorboard/, checkpoints/, log/rank_R.log, summary.txt
    status.json, lease.json                       verdict of each attempt; who writes here now

Rank 0 of an attempt opens the folder; the other ranks only look (`inspect`), before any process group is made.
"""

import itertools
import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from moe_dist.config.load import changes_on_resume, load_config, resolved_yaml
from moe_dist.config.schema import MAY_CHANGE_ON_RESUME, Config
from moe_dist.errors import EXIT_DONE, ConfigError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import WAIT_SECONDS, Holder, Lease, read_holder
from moe_dist.runtime.provenance import record_provenance

BEFORE_OPENING = frozenset({"log", "lease.json", "status.json"})  # what may lie in a folder that no attempt has opened yet


class Start(Enum):
    """What a start with a configuration would do."""

    NEW = "new"
    RESUME = "resume"
    FINISHED = "finished"


@dataclass(frozen=True)
class Ending:
    """One attempt in status.json.

    Attributes:
        attempt_id, restarts: Its name, and how often its launcher had restarted the job before.
        host, pid: Of rank 0.
        started, ended: Unix seconds; ended is None while it runs, or when it died without a word.
        verdict: Exit code; None likewise.
        reason: In words.
        rank: The rank that gave the verdict.
        last_step: Last step taken.
    """

    attempt_id: str
    restarts: int
    host: str
    pid: int
    started: float
    ended: float | None = None
    verdict: int | None = None
    reason: str = ""
    rank: int | None = None
    last_step: int = 0


@dataclass(frozen=True)
class Status:
    """All attempts of a run, the latest last."""

    attempts: tuple[Ending, ...] = ()

    @property
    def latest(self) -> Ending | None:
        return self.attempts[-1] if self.attempts else None

    def of(self, attempt_id: str) -> Ending | None:
        """The entry of one attempt."""
        return next((ending for ending in self.attempts if ending.attempt_id == attempt_id), None)


class RunFolder:
    """The folder of one run.

    Args:
        path: <run.root>/<run.name>.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
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
        return cls(Path(config.run.root) / config.run.name)

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank_{rank}.log"

    def inspect(self, config: Config) -> Start:
        """What a start with `config` would do here. Reads only, so every rank may ask.

        Raises:
            ConfigError: the folder holds another configuration (with the difference), or something that is no run.
        """
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
                    *error.faults,
                ]
            ) from error

    def move_aside(self) -> Path | None:
        """For --overwrite: renames the folder to <name>.old-1 (or -2, ...). None where there is no run to move.

        Raises:
            LeaseError: an attempt writes to it at this moment.
            ConfigError: it is no run.
        """
        if not self.config_yaml.is_file():
            self._refuse_strangers()
            return None
        lease = Lease(self.lease_json, f"overwrite-{uuid.uuid4().hex[:8]}").acquire(wait_seconds=0.0)
        try:
            taken = {entry.name for entry in self.path.parent.iterdir()}
            name = next(n for k in itertools.count(1) if (n := f"{self.path.name}.old-{k}") not in taken)
            old = self.path.rename(self.path.with_name(name))
            (old / self.lease_json.name).unlink(missing_ok=True)
        finally:
            lease.release()
        return old

    def open(self, config: Config, env: RankEnv, *, wait_seconds: float = WAIT_SECONDS) -> Lease:
        """On rank 0: takes the lease, writes configuration and provenance, and begins the attempt in status.json.

        Returns:
            The lease, to be checked before each commit and released at the end.

        Raises:
            ConfigError: as `inspect`.
            LeaseError: another attempt writes here and did not leave within `wait_seconds`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lease = Lease(self.lease_json, env.attempt_id).acquire(wait_seconds)
        try:
            self.inspect(config)  # again: the attempt we waited for may have changed the folder
            # Before anything else: until it stands, a rank that looks at a folder with other things in it takes them for
            # somebody's own.
            write_atomically(self.config_yaml, resolved_yaml(config))
            for folder in (self.logs, self.checkpoints):
                folder.mkdir(exist_ok=True)
            record_provenance(self.path, env.attempt_id)
            self._begin(env)
        except BaseException:
            lease.release()
            raise
        return lease

    def read_status(self) -> Status:
        """All attempts; empty where none has begun."""
        if not self.status_json.is_file():
            return Status()
        return Status(tuple(Ending(**entry) for entry in json.loads(self.status_json.read_text())["attempts"]))

    def last_step(self) -> int:
        """Last step that an attempt reported; 0 before the first."""
        latest = self.read_status().latest
        return latest.last_step if latest is not None else 0

    def write_status(self, *, verdict: int, reason: str, last_step: int, attempt_id: str, rank: int = 0) -> bool:
        """Writes how an attempt ended. Any rank may: the first to do so gives the verdict, since a rank that fails writes
        before it leaves, and its peers fail only after that.

        Returns:
            Whether it was written; False where the attempt has its verdict already, or no longer holds the lease.
        """
        holder = read_holder(self.lease_json)
        if holder is None or holder.attempt_id != attempt_id:
            return False
        claim = self.path / f".verdict_{attempt_id}"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))  # the file server decides, not a cache
        except FileExistsError:
            return False
        ending = self.read_status().of(attempt_id)
        if ending is None:
            return False
        values = {"verdict": verdict, "reason": reason, "last_step": last_step, "rank": rank, "ended": time.time()}
        self._write(Ending(**{**asdict(ending), **values}))
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

    def _begin(self, env: RankEnv) -> None:
        me = Holder.this_process(env.attempt_id)
        for claim in self.path.glob(".verdict_*"):
            claim.unlink(missing_ok=True)
        self._write(Ending(env.attempt_id, env.attempt, me.host, me.pid, time.time(), last_step=self.last_step()))

    def _write(self, ending: Ending) -> None:
        attempts = [entry for entry in self.read_status().attempts if entry.attempt_id != ending.attempt_id]
        summary = {
            "verdict": ending.verdict,
            "reason": ending.reason,
            "last_step": ending.last_step,
            "restarts": len(attempts),
            "attempts": [asdict(entry) for entry in (*attempts, ending)],
        }
        write_atomically(self.status_json, json.dumps(summary, indent=1) + "\n")

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


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file: a reader sees the old or the new text whole, also after a crash of the machine."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, path)
