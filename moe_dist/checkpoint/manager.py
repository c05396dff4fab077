"""Saves, commits, loads and deletes the checkpoints of a run.

    <folder>/step_N/shard_R.safetensors   tensors of rank R                    (storage.py)
                    index.json            which file contains which tensor     (index.py)
                    state.json            everything except tensors            (index.py)
                    SHA256SUMS            digests of the two JSON files        (contents.py)
    <folder>/latest                       name of the newest committed folder

A checkpoint is committed when `latest` names it. A save writes its files to a folder `step_N.<id>.tmp`. The id is random,
so that two processes that save the same step cannot mix their files.
"""

import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from pydantic import JsonValue

from moe_dist.checkpoint.collective_status import CollectiveStatus
from moe_dist.checkpoint.contents import CHECKSUMS_FILE, Contents, checksums_of, open_checkpoint, open_shard
from moe_dist.checkpoint.directory import LATEST_FILE, NONE_YET, CheckpointDirectory, find_checkpoint
from moe_dist.checkpoint.fingerprint import hexadecimal, signed
from moe_dist.checkpoint.fits import Taken, check_complete, check_fits, fitting, taken_from
from moe_dist.checkpoint.index import (
    INDEX_FILE,
    STATE_FILE,
    CheckpointProblem,
    Cut,
    DamagedError,
    Source,
    read_index,
    shard_file,
    stored_name,
)
from moe_dist.checkpoint.shard_header import ShardHeader
from moe_dist.checkpoint.state import OPTIMIZER_PREFIX, CheckpointState, RankLayout, TensorSpec
from moe_dist.checkpoint.storage import (
    HostBuffers,
    Piece,
    Snapshot,
    build_index,
    check_finite,
    pieces_of,
    read_tensors,
    sync,
    take_snapshot,
    write_durably,
    write_shard,
)
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.errors import CheckpointError, ConfigError, DataError, DivergedError
from moe_dist.optim.optimizer import set_step_count
from moe_dist.placement.parameter_names import EXPERT_NAME

SLACK = 1 << 20  # the disk must have this many free bytes, plus 1.01 x the bytes of the tensors


@dataclass(frozen=True)
class Restored:
    """Step and JSON values of a loaded checkpoint."""

    step: int
    values: dict[str, JsonValue]
    rank_values: dict[str, JsonValue]  # see `CheckpointState.rank_values`; empty if the number of ranks has changed
    optimizer_steps: int | None = None  # None without an optimizer


class CheckpointManager:
    """Saves and loads the checkpoints of one run.

    `save`, `snapshot`, `write`, `clear`, `latest`, `load` and `load_fitting` are collective over `process_group`: every
    rank calls these methods in the same order and gets the same result. The methods use small all-reduces on the host.
    There is one before a write, and one after each phase, which tells every rank whether any rank failed. A thread may run
    `write` during training if no other thread uses `process_group` at that time.

    Args:
        folder: Folder of the run's checkpoints, on a file system that all ranks share.
        keep: Number of committed checkpoints to keep.
        lease_check: Function that rank 0 calls before it writes anything, and before each rename. The function raises if
            this process has lost the run's lease, which is the right to write to the run's folder.
        process_group: Gloo group of all ranks; None for a single rank.
        tracker: The watchdog's tracker of collectives. The collectives of `write` are not tracked: if a thread runs
            `write`, they interleave with the training's collectives in a different order on each rank.

    Attributes:
        folder: The argument `folder`.
        newest: The checkpoint that this manager loaded or committed last, or None; equal on all ranks.
        status: Lets callers run their own phases, which fail either on all ranks or on none.
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
        self.folder, self._keep, self._lease_check = folder, keep, lease_check
        self._directory = CheckpointDirectory(folder)
        self.newest: Path | None = None
        self.status = CollectiveStatus(str(folder), process_group, tracker)
        self._untracked = CollectiveStatus(str(folder), process_group)

    @property
    def rank(self) -> int:
        return self.status.rank

    def save(self, step: int, state: CheckpointState) -> Path:
        """Saves `state` without copying it first. Returns after the checkpoint is committed."""
        return self.write(self.snapshot(step, state))

    def snapshot(self, step: int, state: CheckpointState, buffers: HostBuffers | None = None) -> Snapshot:
        """Calls `take_snapshot`, which also checks for nan and inf. Every save begins here, so no checkpoint contains them.

        Raises:
            DivergedError: on all ranks, if a tensor that any rank writes contains nan or inf.
        """
        self._check_layout(state.layout)  # a wrong layout would write tensors twice or not at all
        return self.status.phase(f"save step_{step}", lambda: take_snapshot(step, state, buffers))

    def check_finite(self, folder: Path, state: CheckpointState) -> None:
        """Checks the tensors loaded from `folder` for nan and inf, because earlier versions could save such tensors.

        Raises:
            DivergedError: on all ranks, if the tensors contain nan or inf.
        """

        def check() -> None:
            try:
                check_finite(pieces_of(state.written()))
            except DivergedError as error:
                fix = self._directory.fix(folder)
                raise DivergedError(f"{folder}: {error}: it was saved after the run had diverged. {fix}") from None

        self.status.phase("resume", check)

    def write(self, snapshot: Snapshot) -> Path:
        """Writes and commits the folder `step_N`, then deletes all but the newest `keep` checkpoints. Does nothing if
        `latest` already names `step_N`.

        Raises:
            CheckpointError: on all ranks, if any rank cannot write or the disk is full. `latest` is left unchanged. The
                files of this save are deleted, so that a later save may succeed.
            MoeDistError: the lease check failed on rank 0, which raises that error; the other ranks raise a MoeDistError.
        """
        target = self._directory.path_of(snapshot.step)
        needed, save_id, committed = self._announce(snapshot)
        if committed:  # a resumed run without remaining steps saves the step that it loaded
            self.newest = target
            return target
        temporary = self.folder / f"{target.name}.{save_id}.tmp"
        status = self._untracked
        try:
            status.first("prepare", lambda: self._prepare(temporary, needed), kind=CheckpointError)
            write = partial(write_shard, temporary, status.rank, snapshot.pieces, save_id=save_id, step=snapshot.step)
            status.phase("write", partial(write, rank_values=snapshot.rank_values), kind=CheckpointError)
            status.first("commit", lambda: self._commit(temporary, target, save_id, snapshot), kind=CheckpointError)
        except BaseException:
            if status.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.newest = target
        if status.rank == 0:
            self._tidy(snapshot.step)
        return target

    def clear(self) -> None:
        """Deletes the temporary files of crashed or suspended processes. A process that has just acquired the run's lease
        must call this method before it loads anything. A suspended process that wakes up then finds no folder to commit.

        Raises:
            CheckpointError: a file cannot be deleted.
            MoeDistError: the lease check failed on rank 0, which raises that error; the other ranks raise a MoeDistError.
        """

        def remove() -> None:
            self._lease_check()
            if self.folder.is_dir():
                self._directory.remove_leftovers()

        self.status.first("remove leftovers", remove, kind=CheckpointError)

    def latest(self) -> Path | None:
        """Returns the folder of the newest committed checkpoint, or None if there is none. Rank 0 reads `latest` for all
        ranks. Raises DataError if `latest` names no checkpoint, or is missing although there are checkpoints."""
        step = self.status.broadcast("find the latest", self._directory.latest_step)
        return None if step < 0 else self._directory.path_of(step)

    def load(self, folder: Path, state: CheckpointState) -> Restored:
        """Loads a checkpoint into the tensors of `state`, and sets the step count of its optimizer. The checkpoint may have
        been saved under any layout of ranks.

        Compares the loaded tensors with the saved fingerprints, to detect damage on disk and wrongly assembled tensors.
        Loads no moments if `state` has no optimizer. After an error some tensors of `state` may already be overwritten.

        Raises:
            ConfigError: the checkpoint is of another model. The error lists the differences in names, shapes and dtypes.
            DataError: a file is missing, damaged or foreign. The error names that file and the run's other checkpoints.
        """
        self._check_layout(state.layout)
        try:
            contents, rank_values = self.status.phase("load", lambda: self._read(folder, state))
            shared = state.specs.keys() & contents.index.tensors.keys()
            self._check_loaded(contents, state, {name: name for name in shared})
        except DataError as error:
            raise self._with_fix(error, folder) from error
        self.newest = folder
        return Restored(contents.state.step, contents.state.values, rank_values, contents.state.optimizer_steps)

    def load_fitting(
        self,
        path: Path,
        state: CheckpointState,
        *,
        sources: Callable[[Contents, Mapping[str, TensorSpec]], Mapping[str, Source]] = fitting,
        check: Callable[[Contents], None] | None = None,
    ) -> Taken:
        """Loads only those parameters of the model that `sources` selects.

        Args:
            path: Path that `find_checkpoint` accepts.
            sources: Function that maps each parameter to be loaded to its source in the checkpoint; must return the same on
                all ranks. The default selects the parameters with equal name, shape and dtype. The modules `upcycle`,
                `split` and `base` define other functions. If an expert group loads parts (`Cut`) of a stored tensor, these
                parts together must make up the whole stored tensor.
            check: Function that is called before any tensor is read. It raises an error to reject the checkpoint.

        Raises:
            ConfigError: there is no checkpoint, `sources` selects nothing, or `sources` or `check` rejects the checkpoint.
            DataError: a file is missing, damaged or foreign.
        """
        self._check_layout(state.layout)

        def read() -> tuple[Contents, dict[str, Source]]:
            contents = open_checkpoint(find_checkpoint(path))  # checks all JSON files and their digests
            if check is not None:
                check(contents)
            found = dict(sources(contents, state.specs))
            if not found:
                raise ConfigError(f"{path}: no tensor of that checkpoint has the name, shape and dtype of a parameter")
            self._check_headers(contents)
            read_tensors(contents, {name: held for name, held in state.tensors().items() if name in found}, found)
            return contents, found

        contents, found = self.status.phase("load", read)
        self._check_loaded(contents, state, found)
        return taken_from(contents, state.specs, found)

    def _check_layout(self, layout: RankLayout) -> None:
        rank, world_size = self.status.rank, self.status.world_size
        assert (layout.rank, layout.world_size) == (rank, world_size), (
            f"the state is for rank {layout.rank} of {layout.world_size}, but the process group has {rank} of {world_size}"
        )

    def _announce(self, snapshot: Snapshot) -> tuple[int, str, bool]:
        """Returns the total number of bytes that the ranks will write, the save's id, and whether the step is already
        committed. Costs one all-reduce."""
        first = self.status.rank == 0
        # All ranks except rank 0 contribute 0 to the id and the flag, so that these two sums equal rank 0's values.
        mine = [snapshot.nbytes, secrets.randbits(48) if first else 0, int(first and self._is_latest(snapshot.step))]
        total, save_id, committed = self._untracked.add(mine)
        return total, f"{save_id:012x}", bool(committed)

    def _prepare(self, temporary: Path, needed: int) -> None:
        self._lease_check()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._directory.remove_leftovers()
        free, wanted = shutil.disk_usage(self.folder).free, needed + needed // 100 + SLACK
        if free < wanted:
            raise CheckpointError(
                f"checkpoint in {self.folder}: needs {wanted:,} bytes, but {free:,} are free; free space, or lower "
                "checkpoint.keep"
            )
        if not (self.folder / LATEST_FILE).exists() and not self._directory.steps():
            # `latest` is written before the first commit, because a crash between the commit's two renames would
            # otherwise leave a checkpoint but no `latest`.
            self._point(NONE_YET)
        temporary.mkdir()  # raises if the folder exists

    def _commit(self, temporary: Path, target: Path, save_id: str, snapshot: Snapshot) -> None:
        """Writes index.json, state.json and SHA256SUMS, then renames the folder and replaces `latest`. Only rank 0 calls
        this method. Syncs each file and rename to disk before the next action. Checks the lease right before each
        rename."""
        try:
            ranks = self.status.world_size
            index = build_index(temporary, snapshot.specs, step=snapshot.step, save_id=save_id, num_shards=ranks)
        except DataError as error:
            raise CheckpointError(f"the written files cannot be read back: {error}") from error
        check_complete(index, snapshot.specs)  # reads no tensor
        files = {INDEX_FILE: index.model_dump_json().encode(), STATE_FILE: snapshot.state_file(save_id).to_json()}
        for name, content in {**files, CHECKSUMS_FILE: checksums_of(files, save_id)}.items():
            write_durably(temporary / name, content)
        sync(temporary)  # the folder's list of names must be on disk before the rename
        self._lease_check()
        if target.exists():  # left by a crash of an earlier save before it replaced `latest`
            target.rename(self.folder / f"{target.name}.{save_id}.removed")
        temporary.rename(target)  # atomic on one file system
        sync(self.folder)
        self._point(f"{target.name}\n".encode())

    def _point(self, content: bytes) -> None:
        """Replaces the file `latest`. Checks the lease right before the rename, because the write may take a long time."""
        pointer = self.folder / f"{LATEST_FILE}.{secrets.token_hex(6)}.tmp"
        try:
            write_durably(pointer, content)
            self._lease_check()
            pointer.rename(self.folder / LATEST_FILE)
        except BaseException:
            pointer.unlink(missing_ok=True)
            raise
        sync(self.folder)

    def _tidy(self, step: int) -> None:
        """Deletes old checkpoints and leftovers. Checks the lease first, because files of another process's unfinished save
        look like leftovers."""
        try:
            self._lease_check()
        except CheckpointError:  # the last metrics are not on disk yet; the next save will delete old checkpoints
            return
        self._directory.remove_beyond(self._keep, step)

    def _is_latest(self, step: int) -> bool:
        """Returns whether `latest` names the checkpoint of this step, and the checkpoint's index confirms the step."""
        try:
            return self._directory.latest_step() == step == read_index(self._directory.path_of(step)).step
        except (OSError, DataError):  # `latest` names no readable checkpoint, so the commit replaces it
            return False

    def _read(self, folder: Path, state: CheckpointState) -> tuple[Contents, dict[str, JsonValue]]:
        """Reads a checkpoint into the tensors of `state`. Returns its contents, and `rank_values` for `Restored`."""
        contents = open_checkpoint(folder)
        check_fits(folder, contents.index, state.specs, ignore_prefix=None if state.optimizer else OPTIMIZER_PREFIX)
        headers = self._check_headers(contents)
        read_tensors(contents, state.tensors())
        if state.optimizer is not None:
            if contents.state.optimizer_steps is None:
                raise DataError(f"checkpoint {folder}: it contains moments, but {STATE_FILE} has no optimizer_steps")
            set_step_count(state.optimizer, contents.state.optimizer_steps)
        same_ranks = contents.index.num_shards == self.status.world_size
        return contents, headers[self.status.rank].rank_values if same_ranks else {}

    def _check_headers(self, contents: Contents) -> dict[int, ShardHeader]:
        """Each of W ranks reads and checks every W-th shard header, so that together they check all headers."""
        numbers = range(self.status.rank, contents.index.num_shards, self.status.world_size)
        return {number: open_shard(contents, number) for number in numbers}

    def _check_loaded(self, contents: Contents, state: CheckpointState, sources: Mapping[str, Source]) -> None:
        """Compares the loaded tensors with the saved fingerprints. Each rank compares those tensors that are whole on this
        rank. For other tensors, the ranks sum the fingerprints of the pieces and compare the sum. `sources` maps each
        loaded tensor to its source in the checkpoint. Costs two all-reduces: the first sums one number per tensor, the
        second reports errors to all ranks."""
        entries = {name: contents.index.tensors[stored_name(there)] for name, there in sources.items()}
        written = state.written().keys()
        # If an expert group loads the parts of a stored tensor, their fingerprints are added under the first part's name.
        cuts = {name: there for name, there in sources.items() if isinstance(there, Cut)}
        first = {(cut.name, _group_of(name)): name for name, cut in cuts.items() if cut.start == 0}
        whole = {name: first[cuts[name].name, _group_of(name)] if name in cuts else name for name in sources}
        sums, wrong = dict.fromkeys(sorted(set(whole.values())), 0), []  # sorted, as all ranks need the same order
        held = {name: tensor for name, tensor in state.tensors().items() if name in sources}
        for name, piece in pieces_of(held).items():
            source, shape = sources[name], entries[name].shape
            if isinstance(source, Cut):
                start = source.offsets(len(shape))
                piece = Piece(piece.tensor, tuple(map(sum, zip(piece.offsets, start, strict=True))), shape)
            found = piece.fingerprint()
            if name in written:  # only one of the ranks with this piece adds its fingerprint
                sums[whole[name]] = signed((sums[whole[name]] + found) % (1 << 64))
            if tuple(piece.tensor.shape) == shape and hexadecimal(found) != entries[name].fingerprint:
                wrong.append(name)
        totals = zip(sums, self.status.add(list(sums.values())), strict=True)
        wrong += [name for name, total in totals if hexadecimal(total) != entries[name].fingerprint]

        def report() -> None:
            if wrong:
                raise DamagedError(
                    f"checkpoint {contents.folder}: the loaded tensors differ from the saved ones",
                    [_damaged(contents, stored_name(sources[name])) for name in dict.fromkeys(wrong)],
                )

        self.status.phase("check the loaded tensors", report)

    def _with_fix(self, error: DataError, folder: Path) -> DataError:
        fix = self._directory.fix(folder)
        if isinstance(error, DamagedError):
            return DamagedError(error.head, error.file_problems, fix=fix)
        extended = DataError([*error.problems, fix], see="docs/checkpoints.md")
        extended.consequence = error.consequence
        return extended


def _damaged(contents: Contents, name: str) -> CheckpointProblem:
    files = dict.fromkeys(shard_file(chunk.shard) for chunk in contents.index.tensors[name].chunks)
    return CheckpointProblem("damaged", ", ".join(files), "its bits differ from those that were saved", name)


def _group_of(name: str) -> str:
    expert = EXPERT_NAME.fullmatch(name)
    assert expert is not None, "only experts are parts"
    return expert["group"]
