"""Checkpoints of a run on disk: written by all ranks, committed by one rename, kept to a number, found and loaded again.

    <folder>/step_N/shard_R.safetensors   the pieces of rank R        (storage.py)
                    index.json            which file holds what       (index.py)
                    state.json            everything that is no tensor (state_file.py)
    <folder>/latest                       name of the newest committed folder

A checkpoint exists from the moment `latest` names it. Until then its files lie in `step_N.<id>.tmp`, under an id of its
own, so that even a second writer that should not be there cannot mix its files in.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import JsonValue
from safetensors import SafetensorError

from moe_dist.checkpoint.index import INDEX_FILE, check_complete, check_fits, read_index
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, CheckpointState, RankLayout
from moe_dist.checkpoint.state_file import STATE_FILE, read_state_file, state_file_of
from moe_dist.checkpoint.storage import (
    build_index,
    read_rank_values,
    read_tensors,
    sync,
    write_durably,
    write_shard,
)
from moe_dist.comm.reduce import sum_over
from moe_dist.comm.watch import Watch
from moe_dist.errors import CheckpointError, ConfigError, DataError, MoeDistError
from moe_dist.optim.adamw import set_step_count

logger = logging.getLogger(__name__)

LATEST_FILE = "latest"
SLACK = 1 << 20  # bytes for headers, index and state, beside 1 % of the tensors

_COMMITTED = re.compile(r"step_(\d+)")
_LEFTOVER = re.compile(r"(step_\d+|latest)\.[0-9a-f]+\.(tmp|removed)")
_UNWRITABLE = 2  # a rank's report in a vote: it could not write; other errors are 1000 + their exit code


@dataclass(frozen=True)
class Restored:
    """What a loaded checkpoint holds besides tensors.

    Attributes:
        values: As saved.
        rank_values: This rank's as saved; empty where the number of ranks was another.
    """

    step: int
    values: dict[str, JsonValue]
    rank_values: dict[str, JsonValue]


class CheckpointManager:
    """Saves and loads the checkpoints of one run.

    `save`, `latest` and `load` are collective over `process_group`: every rank calls them, in the same order, and all get
    the same outcome. They synchronise by small all-reduces of numbers (no object collectives): one before writing, and a
    vote after each phase, which costs a host sync.

    Args:
        folder: Where the checkpoints of the run lie, on a file system that all ranks share.
        keep: Committed checkpoints that stay; older ones are removed.
        lease_check: Called on rank 0 before anything is written, and before each rename; raises if this process may not
            write to the run any more.
        process_group: Of all ranks; None is one rank alone.
        device: Where the votes lie: a CUDA device for a group with NCCL only.
        watch: For the watchdog.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        lease_check: Callable[[], None],
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._folder, self._keep, self._lease_check = folder, keep, lease_check
        self._group, self._device = process_group, device or torch.device("cpu")
        self._watch = watch
        self._rank = dist.get_rank(process_group) if process_group else 0
        self._world_size = dist.get_world_size(process_group) if process_group else 1

    def save(self, step: int, state: CheckpointState) -> Path:
        """Writes `step_<step>`, commits it, and removes what is beyond `keep`. Does nothing if `latest` names it already.

        Raises:
            CheckpointError: on all ranks, where a rank could not write or the disk has no room; `latest` has not moved and
                the partial files are removed, so that a later save may succeed.
            MoeDistError: as the lease check raised it on rank 0, of the same kind on the others.
        """
        self._check_layout(state.layout)
        target = self._folder / f"step_{step}"
        needed, save_id, committed = self._announce(step, state)
        if committed:
            return target
        temporary = self._folder / f"{target.name}.{save_id}.tmp"
        try:
            self._vote("prepare", lambda: self._prepare(temporary, needed), only_first=True)
            self._vote(
                "write",
                lambda: write_shard(temporary, self._rank, state.written(), save_id=save_id, rank_values=state.rank_values),
            )
            self._vote("commit", lambda: self._commit(temporary, target, step, save_id, state), only_first=True)
        except BaseException:
            if self._rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self._rank == 0:
            self._tidy(step)
        return target

    def latest(self) -> Path | None:
        """Folder of the newest committed checkpoint, as rank 0 sees it; None where there is none.

        Raises:
            DataError: `latest` does not name a checkpoint that is there.
        """
        step: list[int] = []
        self._vote("find the latest", lambda: step.append(self._latest_step()), only_first=True, kind=DataError)
        found = torch.tensor(step or [0], dtype=torch.int64, device=self._device)
        number = int(sum_over(found, self._group, name="checkpoint step", watch=self._watch).item())
        return None if number < 0 else self._folder / f"step_{number}"

    def load(self, folder: Path, state: CheckpointState) -> Restored:
        """Loads a checkpoint, written at any layout, into the tensors of `state` and its optimizer's step count, in place.

        A state without optimizer takes the parameters alone. After an error the tensors may be loaded in part.

        Raises:
            ConfigError: the checkpoint is of another model; lists what differs.
            DataError: a file is missing, damaged or foreign; names it.
        """
        self._check_layout(state.layout)
        restored: list[Restored] = []
        self._vote("load", lambda: restored.append(_load(folder, state)), kind=DataError)
        return restored[0]

    def _check_layout(self, layout: RankLayout) -> None:
        assert (layout.rank, layout.world_size) == (self._rank, self._world_size), (
            f"the state is of rank {layout.rank} of {layout.world_size}, the process group's is {self._rank} of "
            f"{self._world_size}"
        )

    def _announce(self, step: int, state: CheckpointState) -> tuple[int, str, bool]:
        """Bytes of all ranks, rank 0's id for this save, and whether the step is committed already. One all-reduce."""
        first = self._rank == 0
        mine = [state.written_bytes(), secrets.randbits(48) if first else 0, int(first and self._is_latest(step))]
        announced = torch.tensor(mine, device=self._device)
        announced = sum_over(announced, self._group, name="checkpoint announcement", watch=self._watch)
        total, save_id, committed = announced.tolist()
        return total, f"{save_id:012x}", bool(committed)

    def _vote(
        self,
        phase: str,
        action: Callable[[], None],
        *,
        only_first: bool = False,
        kind: type[MoeDistError] = CheckpointError,
    ) -> None:
        """Runs `action` (on rank 0 only, or on all) and raises on all ranks if it failed on any. One all-reduce.

        Failures of the file system become `kind`; all others stay what they are on the rank where they happen.
        """
        error: Exception | None = None
        try:
            if self._rank == 0 or not only_first:
                action()
        except (OSError, SafetensorError) as cause:
            error = kind(f"checkpoint in {self._folder}: cannot {phase} on rank {self._rank}: {cause}")
            error.__cause__ = cause
        except Exception as cause:
            error = cause
        reports = torch.zeros(self._world_size, dtype=torch.int64, device=self._device)
        if error is not None:
            reports[self._rank] = _report(error)
        codes = sum_over(reports, self._group, name=f"checkpoint vote to {phase}", watch=self._watch).tolist()
        if error is not None:
            raise error
        if any(codes):
            raise _remote_error(f"checkpoint in {self._folder}: cannot {phase}", codes)

    def _prepare(self, temporary: Path, needed: int) -> None:
        self._lease_check()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        free, wanted = shutil.disk_usage(self._folder).free, needed + needed // 100 + SLACK
        if free < wanted:
            raise CheckpointError(
                f"checkpoint in {self._folder}: needs {wanted:,} bytes and {free:,} are free; make room, or lower "
                "checkpoint.keep"
            )
        temporary.mkdir()

    def _commit(self, temporary: Path, target: Path, step: int, save_id: str, state: CheckpointState) -> None:
        """On rank 0: index and state, then the renames, each after a look at the lease. All durable in this order."""
        try:
            index = build_index(temporary, state.specs, step=step, save_id=save_id, num_shards=self._world_size)
        except DataError as error:
            raise CheckpointError(f"what was written cannot be read back: {error}") from error
        check_complete(index, state.specs)
        write_durably(temporary / INDEX_FILE, index.model_dump_json().encode())
        write_durably(temporary / STATE_FILE, state_file_of(state, step=step, save_id=save_id).to_json())
        sync(temporary)
        self._lease_check()
        if target.exists():  # complete, but `latest` never came to name it
            target.rename(self._folder / f"{target.name}.{save_id}.removed")
        temporary.rename(target)
        sync(self._folder)
        self._lease_check()
        pointer = self._folder / f"{LATEST_FILE}.{save_id}.tmp"
        write_durably(pointer, f"{target.name}\n".encode())
        pointer.rename(self._folder / LATEST_FILE)
        sync(self._folder)

    def _latest_step(self) -> int:
        """Step that `latest` names; -1 without that file."""
        path = self._folder / LATEST_FILE
        try:
            name = path.read_bytes().decode(errors="replace").strip()
        except FileNotFoundError:
            return -1
        match = _COMMITTED.fullmatch(name)
        if match is None or not (self._folder / name / STATE_FILE).is_file():
            raise DataError(f"{path} names {name!r}, which is no checkpoint in that folder; write the name of one into it")
        return int(match[1])

    def _is_latest(self, step: int) -> bool:
        try:
            return self._latest_step() == step
        except (OSError, DataError):  # what `latest` holds is no checkpoint: the one to come replaces it
            return False

    def _tidy(self, step: int) -> None:
        """Removes old checkpoints. The save stands already: a failure here is only reported."""
        try:
            steps = sorted(int(m[1]) for p in self._folder.iterdir() if (m := _COMMITTED.fullmatch(p.name)))
            for old in [each for each in steps if each <= step][: -self._keep]:
                # Renamed first: what is half removed never looks like a checkpoint.
                (self._folder / f"step_{old}").rename(self._folder / f"step_{old}.0.removed")
            self._remove_leftovers()
        except OSError as error:
            logger.warning("cannot remove old checkpoints in %s: %s", self._folder, error)

    def _remove_leftovers(self) -> None:
        """Removes what crashes and `_tidy` left behind. Only the holder of the lease may: others' files look the same."""
        for path in self._folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _load(folder: Path, state: CheckpointState) -> Restored:
    stored, index = read_state_file(folder), read_index(folder)
    if (index.save_id, index.step) != (stored.save_id, stored.step):
        raise DataError(f"checkpoint {folder}: {STATE_FILE} and {INDEX_FILE} are of different saves")
    check_fits(folder, index, state.specs, ignore_prefix=None if state.optimizer else OPTIMIZER_PREFIX)
    read_tensors(folder, index, state.tensors())
    if state.optimizer is not None:
        if stored.optimizer_steps is None:
            raise DataError(f"checkpoint {folder}: {STATE_FILE} has no optimizer_steps, but there are moments")
        set_step_count(state.optimizer, stored.optimizer_steps)
    same_ranks = index.num_shards == state.layout.world_size
    rank_values = read_rank_values(folder, index, state.layout.rank) if same_ranks else {}
    return Restored(stored.step, stored.values, rank_values)


def _report(error: Exception) -> int:
    if isinstance(error, CheckpointError):
        return _UNWRITABLE
    return 1000 + (error.exit_code if isinstance(error, MoeDistError) else MoeDistError.exit_code)


def _remote_error(what: str, codes: list[int]) -> MoeDistError:
    """The error of the other ranks: of the kind that the first failing rank raises itself."""
    ranks = [rank for rank, code in enumerate(codes) if code]
    message = f"{what}: it failed on ranks {ranks}; the log of rank {ranks[0]} says why"
    code = codes[ranks[0]]
    kinds: dict[int, type[MoeDistError]] = {
        _UNWRITABLE: CheckpointError,
        1000 + ConfigError.exit_code: ConfigError,
        1000 + DataError.exit_code: DataError,
    }
    error = kinds.get(code, MoeDistError)(message)
    error.consequence = True
    return error
