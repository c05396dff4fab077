"""Checkpoints of a run on disk: written by all ranks, committed by one rename, kept to a number, found and loaded again.

    <folder>/step_N/shard_R.safetensors   the pieces of rank R        (storage.py)
                    index.json            which file holds what       (index.py)
                    state.json            everything that is no tensor (state_file.py)
                    SHA256SUMS            digests of the two           (seal.py)
    <folder>/latest                       name of the newest committed folder

A checkpoint exists from the moment `latest` names it. Until then its files lie in `step_N.<id>.tmp`, under an id of its
own, so that even a second writer that should not be there cannot mix its files in.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from pydantic import JsonValue

from moe_dist.checkpoint.checksums import SEAL_FILE, seal_of
from moe_dist.checkpoint.collective_status import Ballot
from moe_dist.checkpoint.contents import Contents, open_checkpoint, open_shard
from moe_dist.checkpoint.directory import LATEST_FILE, NONE_YET, CheckpointDirectory, find_checkpoint
from moe_dist.checkpoint.fingerprint import hexadecimal, signed
from moe_dist.checkpoint.fits import check_complete, check_fits
from moe_dist.checkpoint.index import INDEX_FILE, read_index, shard_file
from moe_dist.checkpoint.partial_load import Taken, fitting, taken_from
from moe_dist.checkpoint.problems import CheckpointProblem, DamagedError
from moe_dist.checkpoint.shard_header import ShardHeader
from moe_dist.checkpoint.snapshot import Snapshot, take_snapshot
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, CheckpointState, RankLayout, TensorSpec
from moe_dist.checkpoint.state_file import STATE_FILE
from moe_dist.checkpoint.storage import build_index, pieces_of, read_tensors, sync, write_durably, write_shard
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.errors import CheckpointError, ConfigError, DataError, MoeDistError
from moe_dist.optim.adamw import set_step_count

SLACK = 1 << 20  # bytes for headers, index and state, beside 1 % of the tensors


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

    `save`, `write`, `clear`, `latest`, `load` and `load_fitting` are collective over `process_group`: every rank calls
    them, in the same order, and all get the same outcome. They synchronise by small all-reduces of numbers on the host (no
    object collectives): one before writing, and a vote after each phase. `write` may run on a thread of its own while the
    ranks train, if nothing else uses the group meanwhile.

    Args:
        folder: Where the checkpoints of the run lie, on a file system that all ranks share.
        keep: Committed checkpoints that stay; older ones are removed.
        lease_check: Called on rank 0 before anything is written, and before each rename; raises if this process may not
            write to the run any more.
        process_group: Of all ranks, with gloo; None is one rank alone.
        tracker: For the watchdog. `write` is not noted in it: it has a thread of its own, so its place among the collectives
            of the training is another on each rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        lease_check: Callable[[], None],
        process_group: dist.ProcessGroup | None = None,
        tracker: CollectiveTracker | None = None,
    ) -> None:
        self._folder, self._keep, self._lease_check = folder, keep, lease_check
        self._shelf = CheckpointDirectory(folder)
        self._ballot = Ballot(str(folder), process_group, tracker)
        self._unwatched = Ballot(str(folder), process_group)

    @property
    def rank(self) -> int:
        return self._ballot.rank

    def save(self, step: int, state: CheckpointState) -> Path:
        """`write` of the state as it is, without a copy: the caller does not change it meanwhile."""
        self._check_layout(state.layout)
        return self.write(take_snapshot(step, state))

    def write(self, snapshot: Snapshot) -> Path:
        """Writes `step_<step>`, commits it, and removes what is beyond `keep`. Does nothing if `latest` names it already.

        Raises:
            CheckpointError: on all ranks, where a rank could not write or the disk has no room; `latest` has not moved and
                the partial files are removed, so that a later save may succeed.
            MoeDistError: as the lease check raised it on rank 0, of the same kind on the others.
        """
        self._check_layout(snapshot.layout)
        target = self._shelf.path_of(snapshot.step)
        needed, save_id, committed = self._announce(snapshot)
        if committed:
            return target
        temporary = self._folder / f"{target.name}.{save_id}.tmp"
        ballot = self._unwatched
        try:
            ballot.phase("prepare", lambda: self._prepare(temporary, needed), only_first=True)
            ballot.phase("write", lambda: self._write_own(temporary, snapshot, save_id))
            ballot.phase(
                "commit", lambda: self._commit(temporary, target, snapshot.step, save_id, snapshot), only_first=True
            )
        except BaseException:
            if ballot.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if ballot.rank == 0:
            self._tidy(snapshot.step)
        return target

    def clear(self) -> None:
        """Removes what crashes and earlier writers left. A new holder of the lease calls it before it loads anything: what
        an earlier one wrote before its last look at the lease is gone then, so no rename of it succeeds, however late.

        Raises:
            CheckpointError: something cannot be removed.
            MoeDistError: as the lease check raised it on rank 0, of the same kind on the others.
        """

        def remove() -> None:
            self._lease_check()
            if self._folder.is_dir():
                self._shelf.remove_leftovers()

        self.agree("remove leftovers", remove, kind=CheckpointError)

    def latest(self) -> Path | None:
        """Folder of the newest committed checkpoint, as rank 0 sees it; None where there is none.

        Raises:
            DataError: `latest` does not name a checkpoint that is there, or is missing though there are some.
        """
        step = [0]

        def find() -> None:
            step[0] = self._shelf.latest_step()

        self.agree("find the latest", find, kind=DataError)
        (number,) = self._ballot.add(step)
        return None if number < 0 else self._shelf.path_of(number)

    def agree(self, what: str, action: Callable[[], None], *, kind: type[MoeDistError] = DataError) -> None:
        """Runs something on rank 0; all ranks raise if it fails. Failures of the file system become `kind`."""
        self._ballot.phase(what, action, only_first=True, kind=kind)

    def of_first(self, numbers: list[int]) -> list[int]:
        """Rank 0's numbers on all ranks; the others bring as many of any value."""
        return self._ballot.add(numbers if self._ballot.rank == 0 else [0] * len(numbers))

    def load(self, folder: Path, state: CheckpointState) -> Restored:
        """Loads a checkpoint, written at any layout, into the tensors of `state` and its optimizer's step count, in place.

        What lies in memory afterwards is held against the fingerprints that were taken when it was saved, shards over all
        ranks together: so damage is found, and a mistake in putting the pieces together as well. A state without optimizer
        takes the parameters alone. After an error the tensors may be loaded in part.

        Raises:
            ConfigError: the checkpoint is of another model; lists what differs.
            DataError: a file is missing, damaged or foreign; names it, and the other checkpoints that are there.
        """
        self._check_layout(state.layout)
        opened: list[tuple[Contents, dict[str, JsonValue]]] = []
        try:
            self._ballot.phase("load", lambda: opened.append(self._read(folder, state)), kind=DataError)
            contents, rank_values = opened[0]
            shared = state.specs.keys() & contents.index.tensors.keys()
            self._check_loaded(contents, state, {name: name for name in shared})
        except DataError as error:
            raise self._with_fix(error, folder) from error
        return Restored(contents.state.step, contents.state.values, rank_values)

    def load_fitting(
        self,
        path: Path,
        state: CheckpointState,
        *,
        sources: Callable[[Contents, Mapping[str, TensorSpec]], Mapping[str, str]] = fitting,
        check: Callable[[Contents], None] | None = None,
    ) -> Taken:
        """Loads the parameters that `sources` finds in the checkpoint; all else stays as it is.

        Args:
            path: As `find_checkpoint` takes it.
            sources: For each parameter to load its name in the checkpoint, the same on all ranks: by default those whose
                names, shapes and dtypes agree; see `moe_dist.checkpoint.upcycle` and `base` for others. May raise.
            check: Called with the checkpoint before a tensor is read; may raise.

        Raises:
            ConfigError: there is no checkpoint, or nothing of it fits; or as `sources` and `check`.
            DataError: as `load`.
        """
        self._check_layout(state.layout)
        opened: list[tuple[Contents, dict[str, str]]] = []

        def read() -> None:
            contents = open_checkpoint(find_checkpoint(path))
            if check is not None:
                check(contents)
            found = dict(sources(contents, state.specs))
            if not found:
                raise ConfigError(f"{path}: nothing of that checkpoint fits this model, neither a name nor a shape")
            self._check_headers(contents)
            read_tensors(contents, {name: held for name, held in state.tensors().items() if name in found}, found)
            opened.append((contents, found))

        self._ballot.phase("load", read, kind=DataError)
        contents, found = opened[0]
        self._check_loaded(contents, state, found)
        return taken_from(contents, state.specs, found)

    def _check_layout(self, layout: RankLayout) -> None:
        rank, world_size = self._ballot.rank, self._ballot.world_size
        assert (layout.rank, layout.world_size) == (rank, world_size), (
            f"the state is of rank {layout.rank} of {layout.world_size}, the process group's is {rank} of {world_size}"
        )

    def _announce(self, snapshot: Snapshot) -> tuple[int, str, bool]:
        """Bytes of all ranks, rank 0's id for this save, and whether the step is committed already. One all-reduce."""
        first = self._ballot.rank == 0
        mine = [snapshot.nbytes, secrets.randbits(48) if first else 0, int(first and self._is_latest(snapshot.step))]
        total, save_id, committed = self._unwatched.add(mine)
        return total, f"{save_id:012x}", bool(committed)

    def _prepare(self, temporary: Path, needed: int) -> None:
        self._lease_check()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shelf.remove_leftovers()
        free, wanted = shutil.disk_usage(self._folder).free, needed + needed // 100 + SLACK
        if free < wanted:
            raise CheckpointError(
                f"checkpoint in {self._folder}: needs {wanted:,} bytes and {free:,} are free; make room, or lower "
                "checkpoint.keep"
            )
        if not (self._folder / LATEST_FILE).exists() and not self._shelf.steps():
            # So that a `latest` that is missing later was removed by somebody, and not by a crash in the first commit.
            self._point(NONE_YET)
        temporary.mkdir()

    def _write_own(self, temporary: Path, snapshot: Snapshot, save_id: str) -> None:
        """On each rank: its own pieces."""
        write_shard(
            temporary,
            self._ballot.rank,
            snapshot.pieces,
            save_id=save_id,
            step=snapshot.step,
            rank_values=snapshot.rank_values,
        )

    def _commit(self, temporary: Path, target: Path, step: int, save_id: str, snapshot: Snapshot) -> None:
        """On rank 0: index and state, then the renames, each right after a look at the lease and of what was written before
        it, see `clear`. All durable in this order."""
        try:
            index = build_index(temporary, snapshot.specs, step=step, save_id=save_id, num_shards=self._ballot.world_size)
        except DataError as error:
            raise CheckpointError(f"what was written cannot be read back: {error}") from error
        check_complete(index, snapshot.specs)
        files = {INDEX_FILE: index.model_dump_json().encode(), STATE_FILE: snapshot.state_file(save_id).to_json()}
        for name, content in {**files, SEAL_FILE: seal_of(files, save_id)}.items():
            write_durably(temporary / name, content)
        sync(temporary)
        self._lease_check()
        if target.exists():  # complete, but `latest` never came to name it
            target.rename(self._folder / f"{target.name}.{save_id}.removed")
        temporary.rename(target)
        sync(self._folder)
        self._point(f"{target.name}\n".encode())

    def _point(self, content: bytes) -> None:
        """Replaces `latest`, durably, after a look at the lease: right before the rename, since syncing may take long."""
        pointer = self._folder / f"{LATEST_FILE}.{secrets.token_hex(6)}.tmp"
        try:
            write_durably(pointer, content)
            self._lease_check()
            pointer.rename(self._folder / LATEST_FILE)
        except BaseException:
            pointer.unlink(missing_ok=True)
            raise
        sync(self._folder)

    def _tidy(self, step: int) -> None:
        """After a look of its own: another writer's files that are still being written look like leftovers."""
        try:
            self._lease_check()
        except CheckpointError:  # something else has to be written first; the next save tidies
            return
        self._shelf.remove_beyond(self._keep, step)

    def _is_latest(self, step: int) -> bool:
        """Whether `latest` names a checkpoint of this step, by its name and by what is in it. Reads its index if so."""
        try:
            return self._shelf.latest_step() == step == read_index(self._shelf.path_of(step)).step
        except (OSError, DataError):  # what `latest` holds is no checkpoint: the one to come replaces it
            return False

    def _read(self, folder: Path, state: CheckpointState) -> tuple[Contents, dict[str, JsonValue]]:
        """What was opened, and this rank's values where as many ranks wrote it."""
        contents = open_checkpoint(folder)
        check_fits(folder, contents.index, state.specs, ignore_prefix=None if state.optimizer else OPTIMIZER_PREFIX)
        headers = self._check_headers(contents)
        read_tensors(contents, state.tensors())
        if state.optimizer is not None:
            if contents.state.optimizer_steps is None:
                raise DataError(f"checkpoint {folder}: {STATE_FILE} has no optimizer_steps, but there are moments")
            set_step_count(state.optimizer, contents.state.optimizer_steps)
        same_ranks = contents.index.num_shards == self._ballot.world_size
        return contents, headers[self._ballot.rank].rank_values if same_ranks else {}

    def _check_headers(self, contents: Contents) -> dict[int, ShardHeader]:
        """Each shard's header, also of one that no rank reads, is looked at by one rank at least; those of this one."""
        numbers = range(self._ballot.rank, contents.index.num_shards, self._ballot.world_size)
        return {number: open_shard(contents, number) for number in numbers}

    def _check_loaded(self, contents: Contents, state: CheckpointState, sources: Mapping[str, str]) -> None:
        """Holds what lies in memory under the names of `sources` (the same on all ranks) against the fingerprints of what
        each was read from: whole tensors on each rank that has them, shards by their sum over the ranks. One all-reduce of
        a number a tensor, and one vote."""
        entries, written = {name: contents.index.tensors[there] for name, there in sources.items()}, state.written().keys()
        sums, wrong = dict.fromkeys(sorted(sources), 0), []
        held = {name: tensor for name, tensor in state.tensors().items() if name in sums}
        for name, piece in pieces_of(held).items():
            found = piece.fingerprint()
            if name in written:  # by exactly one of the ranks that hold it
                sums[name] = signed(found)
            if tuple(piece.tensor.shape) == piece.shape and hexadecimal(found) != entries[name].fingerprint:
                wrong.append(name)
        totals = zip(sums, self._ballot.add(list(sums.values())), strict=True)
        wrong += [name for name, total in totals if hexadecimal(total) != entries[name].fingerprint]

        def tell() -> None:
            if wrong:
                raise DamagedError(
                    f"checkpoint {contents.folder}: what was loaded is not what was saved",
                    [_damaged(contents, sources[name]) for name in dict.fromkeys(wrong)],
                )

        self._ballot.phase("check what was loaded", tell, kind=DataError)

    def _with_fix(self, error: DataError, folder: Path) -> DataError:
        fix = self._shelf.fix(folder)
        if isinstance(error, DamagedError):
            return DamagedError(error.head, error.findings, fix=fix)
        told = DataError([*error.problems, fix], see="docs/checkpoints.md")
        told.consequence = error.consequence
        return told


def _damaged(contents: Contents, name: str) -> CheckpointProblem:
    files = dict.fromkeys(shard_file(chunk.shard) for chunk in contents.index.tensors[name].chunks)
    return CheckpointProblem("damaged", ", ".join(files), "its bits are not those that were saved", name)
