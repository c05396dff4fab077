"""Writes tensors to shard files and reads them, without collectives and without pickle. For asynchronous saves, copies
tensors to the host.

A rank reads only the stored parts that intersect its own parts, even if they were saved under another layout of ranks. The
`save` and `load` of torch.distributed.checkpoint (DCP) are not used, because they exchange pickled plans. The shard files
are safetensors files with the metadata key `DCP_SHARDING_INFO`, so that DCP's HuggingFaceStorageReader can read them.
"""

import json
import os
import platform
import secrets
import shutil
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moe_dist.checkpoint.contents import Contents, open_shard
from moe_dist.checkpoint.fingerprint import fingerprint, hexadecimal
from moe_dist.checkpoint.index import Chunk, Cut, Entry, Index, ShardEntry, Source, StateFile, shard_file, stored_name
from moe_dist.checkpoint.shard_header import metadata_of, read_shard_header
from moe_dist.checkpoint.state import CheckpointState, RankLayout, TensorSpec
from moe_dist.config.bundled import VERSION
from moe_dist.errors import CheckpointError, ConfigError, DataError, DivergedError
from moe_dist.optim.optimizer import step_count


@dataclass(frozen=True)
class Piece:
    """The part of a logical tensor (a tensor of the checkpoint) that one rank has."""

    tensor: Tensor  # the elements of the piece, as a plain tensor
    offsets: tuple[int, ...]  # index of the piece's first element in each dim of the whole tensor
    shape: tuple[int, ...]  # shape of the whole tensor

    def fingerprint(self) -> int:
        """Returns the fingerprint of this piece. The fingerprints of all pieces add up to the whole tensor's
        fingerprint."""
        return fingerprint(self.tensor, offsets=self.offsets, shape=self.shape)


def pieces_of(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Returns this rank's piece of each tensor, plain or DTensor, by name. A piece is a view into the memory of its tensor.
    The result omits pieces without elements."""
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        local, offsets = tensor.detach(), (0,) * tensor.ndim
        if isinstance(local, DTensor):
            _, offsets = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
            local = local.to_local()
        if local.numel():
            pieces[name] = Piece(local, tuple(offsets), tuple(tensor.shape))
    return pieces


@dataclass(frozen=True)
class Snapshot:
    """The data that this rank saves at step `step`. For `specs`, `values` and `rank_values` see `CheckpointState`."""

    step: int
    pieces: Mapping[str, Piece]  # by logical name; exactly one rank writes each piece
    specs: Mapping[str, TensorSpec]  # as in `CheckpointState`
    layout: RankLayout
    optimizer_steps: int | None  # number of steps that the optimizer has taken; None without an optimizer
    values: dict[str, JsonValue]
    rank_values: dict[str, JsonValue]

    @property
    def nbytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self.pieces.values())

    def state_file(self, save_id: str) -> StateFile:
        """Returns the content of state.json."""
        placement = self.layout.placement
        groups_and_slots = {"groups": [asdict(group) for group in placement.groups], "slots": placement.slots}
        versions: dict[str, JsonValue] = {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "moe_dist": VERSION,
        }
        return StateFile(
            save_id=save_id,
            step=self.step,
            world_size=self.layout.world_size,
            optimizer_steps=self.optimizer_steps,
            placement=json.loads(json.dumps(groups_and_slots)),
            versions=versions,
            values=self.values,
        )


class HostBuffers:
    """Host memory for copies of the tensors that this rank saves. Each call of `copy` overwrites the previous copies."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, pieces: Mapping[str, Piece]) -> dict[str, Piece]:
        """Copies the pieces. On CUDA the copy ends with one device sync."""
        copies: dict[str, Piece] = {}
        devices: set[torch.device] = set()
        for name, piece in pieces.items():
            buffer = self._buffer(name, piece.tensor)
            buffer.copy_(piece.tensor, non_blocking=True)  # asynchronous on CUDA (pinned buffers), synced below
            devices.add(piece.tensor.device)
            copies[name] = Piece(buffer, piece.offsets, piece.shape)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # waits for the copies; afterwards the training may change the tensors
        return copies

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        known = self._buffers.get(name)
        if known is None or known.shape != like.shape or known.dtype != like.dtype:
            known = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            self._buffers[name] = known
        return known


def check_finite(pieces: Mapping[str, Piece]) -> None:
    """Raises DivergedError if a piece contains nan or inf. Costs one device-to-host sync per device, and one pass over the
    pieces, which takes as long as copying them."""
    flags: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, piece in pieces.items():
        if piece.tensor.is_floating_point():
            # A NaN makes both the minimum and the maximum NaN. `isfinite` would allocate memory and take 10 x as long.
            flags[piece.tensor.device][name] = torch.stack(piece.tensor.aminmax()).isfinite().all()
    read = {
        name: flag
        for each in flags.values()
        for name, flag in zip(each, torch.stack([*each.values()]).tolist(), strict=True)
    }
    if wrong := [name for name, finite in read.items() if not finite]:
        raise DivergedError(f"{len(wrong)} of {len(pieces)} tensors contain nan or inf, the first is {wrong[0]}")


def take_snapshot(step: int, state: CheckpointState, buffers: HostBuffers | None = None) -> Snapshot:
    """Takes a snapshot of `state`. Costs a device-to-host sync, which reads the optimizer's step count, and the cost of
    `check_finite`. Copies the tensors to `buffers`; without `buffers` makes no copies, and the training must wait for the
    save. Raises DivergedError if a tensor contains nan or inf."""
    pieces = pieces_of(state.written())
    check_finite(pieces)
    return Snapshot(
        step=step,
        pieces=buffers.copy(pieces) if buffers is not None else pieces,
        specs=state.specs,
        layout=state.layout,
        optimizer_steps=step_count(state.optimizer) if state.optimizer is not None else None,
        values=dict(state.values),  # JSON values are copied, because the training changes them
        rank_values=dict(state.rank_values),
    )


def write_shard(
    folder: Path, number: int, pieces: Mapping[str, Piece], *, save_id: str, step: int, rank_values: Mapping[str, Any]
) -> None:
    """Writes one rank's pieces and their fingerprints into the shard file `number`, and syncs the file to disk.

    Pieces on a GPU are first copied to the host, which takes as much host memory as the file has bytes.
    """
    data = {name: piece.tensor.cpu().contiguous() for name, piece in pieces.items()}  # as safetensors needs
    metadata = metadata_of(
        {name: list(piece.offsets) for name, piece in pieces.items()},
        {name: hexadecimal(piece.fingerprint()) for name, piece in pieces.items()},
        save_id=save_id,
        step=step,
        rank_values=rank_values,
    )
    write_tensors(folder / shard_file(number), data, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file and syncs it to disk. The file has the default permissions under the umask."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)  # writes a file that only its owner can read
    path.chmod(stat.S_IMODE(mode))
    sync(path)


def sync(path: Path) -> None:
    """Waits until the content of a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and syncs it to disk."""
    path.write_bytes(content)
    sync(path)


def build_index(folder: Path, specs: Mapping[str, TensorSpec], *, step: int, save_id: str, num_shards: int) -> Index:
    """Makes the index of the shard files 0 to `num_shards` - 1 in `folder` from the files' headers. Reads no tensor. Raises
    DataError if a file is damaged or belongs to another save than `save_id`."""
    chunks: dict[str, list[Chunk]] = {name: [] for name, spec in specs.items() if 0 not in spec.shape}
    sums = dict.fromkeys(chunks, 0)
    dtypes: dict[str, str] = {}
    shards = []
    for number in range(num_shards):
        # Reads the headers from disk, because rank 0 calls this function during a save and has only its own header.
        header = read_shard_header(folder, number)
        if header.save_id != save_id:
            raise DataError(f"checkpoint file {folder / shard_file(number)}: of save {header.save_id}, not of {save_id}")
        for name, (dtype, chunk) in header.parts.items():
            assert name in chunks, f"{shard_file(number)} holds {name}, which the model does not have"
            dtypes[name] = dtype
            chunks[name].append(chunk)
            sums[name] += header.fingerprints[name]
        shards.append(ShardEntry(size=header.size, header_sha256=header.sha256))
    tensors = {
        name: Entry(dtype=dtypes[name], shape=specs[name].shape, fingerprint=hexadecimal(sums[name]), chunks=tuple(parts))
        for name, parts in sorted(chunks.items())
        if parts
    }
    return Index(save_id=save_id, step=step, shards=tuple(shards), tensors=tensors)


def read_tensors(contents: Contents, tensors: Mapping[str, Tensor], sources: Mapping[str, Source] | None = None) -> None:
    """Loads stored data in place into plain tensors and into this rank's shards of DTensors. Reads only the needed bytes.

    Args:
        contents: A checkpoint whose index matches the tensors (`check_fits`).
        sources: Maps a tensor to its source if its name in the checkpoint differs, or if the source is a part of a stored
            tensor. Several tensors may have the same source.

    Raises:
        DataError: a file is missing, truncated, damaged, foreign or of another save.
    """
    index = contents.index
    by_shard: dict[int, list[tuple[str, Chunk, Tensor, Sequence[range]]]] = defaultdict(list)
    for name, piece in pieces_of(tensors).items():
        source = (sources or {}).get(name, name)
        if (entry := index.tensors.get(stored_name(source))) is None:
            continue
        start = source.offsets(len(entry.shape)) if isinstance(source, Cut) else (0,) * len(entry.shape)
        places = tuple(map(sum, zip(piece.offsets, start, strict=True)))
        for chunk in entry.chunks:
            common = _common(places, piece.tensor.shape, chunk.offsets, chunk.shape)
            if all(common):
                target = piece.tensor[_box(common, places)]  # a view
                by_shard[chunk.shard].append((stored_name(source), chunk, target, common))
    for number, reads in sorted(by_shard.items()):  # opens each file only once
        header = open_shard(contents, number)
        with open_tensors(contents.folder, number) as file:
            for name, chunk, target, common in reads:
                if header.parts.get(name) != (index.tensors[name].dtype, chunk):
                    raise DataError(f"checkpoint file {shard_file(number)}: {name} is not the part that the index lists")
                target.copy_(file.get_slice(name)[_box(common, chunk.offsets)])


def _common(
    one_at: Sequence[int], one_shape: Sequence[int], other_at: Sequence[int], other_shape: Sequence[int]
) -> list[range]:
    """Returns the intersection of two boxes as one range of indices per dim. If the boxes do not intersect, at least one
    range is empty."""
    sides = zip(one_at, one_shape, other_at, other_shape, strict=True)
    return [range(max(a, b), min(a + length, b + other)) for a, length, b, other in sides]


def _box(indices: Sequence[range], offsets: Sequence[int]) -> tuple[slice, ...]:
    """Returns the slices of a box in a tensor that begins at `offsets`."""
    return tuple(slice(each.start - at, each.stop - at) for each, at in zip(indices, offsets, strict=True))


@contextmanager
def open_tensors(folder: Path, number: int) -> Iterator[Any]:
    """Opens shard file `number` for reading. The caller must first check the file's header with `open_shard`. Raises
    DataError if the file cannot be opened, or a read in the `with` block fails."""
    path = folder / shard_file(number)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint file {path}: cannot be read: {error}") from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Makes a temporary folder beside `out`. When the `with` block ends, syncs it and renames it to `out`. After an error,
    removes the temporary folder."""
    folder = out.absolute().parent / f"{out.absolute().name}.exporting.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made: {error.strerror or error}") from error
    try:
        yield folder
        sync(folder)
        if os.path.lexists(out):
            raise ConfigError(f"{out} exists by now; nothing is overwritten")
        folder.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
