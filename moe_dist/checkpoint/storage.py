"""Tensors to and from a checkpoint's shard files. No collective, and nothing that is unpickled.

torch.distributed.checkpoint's planners say which box of which tensor goes where, for any layout on either side. Its `save`
and `load` are not used: between planning and writing they gather and scatter pickled plans. The files are safetensors with
DCP's own header (`DCP_SHARDING_INFO`), so that its HuggingFaceStorageReader reads them too.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from moe_dist.checkpoint.index import DTYPES, INDEX_FILE, Chunk, Entry, Index, shard_file
from moe_dist.checkpoint.state import TensorSpec
from moe_dist.errors import DataError

_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_DIALECT: dict[str, bool] = {"flatten_state_dict": False, "flatten_sharded_tensors": False}


def write_shard(
    folder: Path, number: int, tensors: Mapping[str, Tensor], *, save_id: str, rank_values: Mapping[str, Any]
) -> None:
    """Writes one rank's pieces (plain tensors, or the local shards of DTensors) into its file, durably.

    Copies everything to the host first, in the worst case (CUDA) as many bytes as the file has.
    """
    planner = DefaultSavePlanner(**_DIALECT)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    data: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for item in planner.create_local_plan().items:
        piece = planner.resolve_data(item)
        assert isinstance(piece, Tensor)
        assert item.tensor_data is not None
        data[item.index.fqn] = piece.detach().cpu().contiguous()
        offsets[item.index.fqn] = {_OFFSETS: list(item.tensor_data.chunk.offsets)}
    header = {
        "format": "pt",
        _SHARDING: json.dumps(offsets),
        "save_id": save_id,
        "rank_values": json.dumps(dict(rank_values), allow_nan=False),
    }
    path = folder / shard_file(number)
    save_file(data, path, metadata=header)
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file and waits until its bytes are on disk."""
    path.write_bytes(content)
    sync(path)


class ShardFile:
    """An open shard file whose header was checked. A context manager.

    Attributes:
        parts: Dtype (a key of `index.DTYPES`) and box of each tensor that has a part in this file.
        rank_values: Of the rank that wrote it.

    Raises:
        DataError: missing, truncated, no safetensors file, or not of this save; names the file.
    """

    def __init__(self, folder: Path, number: int, save_id: str) -> None:
        self.path = folder / shard_file(number)
        try:
            self._file = safe_open(self.path, framework="pt", device="cpu")
            header = self._file.metadata()
            offsets = json.loads(header[_SHARDING])
            self.parts: dict[str, tuple[str, Chunk]] = {}
            for name in self._file.keys():  # noqa: SIM118  # it is no dict
                part = self._file.get_slice(name)
                chunk = Chunk(shard=number, offsets=tuple(offsets[name][_OFFSETS]), shape=tuple(part.get_shape()))
                self.parts[name] = (part.get_dtype(), chunk)
            self.rank_values: dict[str, Any] = json.loads(header["rank_values"])
            found = header["save_id"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"checkpoint file {self.path} is missing or damaged: {error!r}") from error
        if found != save_id:
            raise DataError(f"checkpoint file {self.path} belongs to another save ({found!r}, not {save_id!r})")

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)

    def read(self, name: str, dtype: str, chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
        """Elements of `box`, counted from the chunk's own origin, after holding the file against the index."""
        if self.parts.get(name) != (dtype, chunk):
            raise DataError(f"checkpoint file {self.path}: {name} is missing or not the part that {INDEX_FILE} names")
        return self._file.get_slice(name)[box]


def build_index(folder: Path, specs: Mapping[str, TensorSpec], *, step: int, save_id: str, num_shards: int) -> Index:
    """The index of what the ranks have written, from the files' headers. Reads no tensor."""
    chunks: dict[str, list[Chunk]] = {name: [] for name, spec in specs.items() if 0 not in spec.shape}
    dtypes: dict[str, str] = {}
    for number in range(num_shards):
        with ShardFile(folder, number, save_id) as file:
            for name, (dtype, chunk) in file.parts.items():
                assert name in chunks, f"{file.path} holds {name}, which the model does not have"
                dtypes[name] = dtype
                chunks[name].append(chunk)
    tensors = {
        name: Entry(dtype=dtypes[name], shape=specs[name].shape, chunks=tuple(parts))
        for name, parts in sorted(chunks.items())
        if parts
    }
    return Index(save_id=save_id, step=step, num_shards=num_shards, tensors=tensors)


def read_tensors(folder: Path, index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fills plain tensors and local shards of DTensors in place, reading only the parts they need.

    Args:
        index: Checked (`read_index`) and fitting the tensors (`check_fits`): its boxes fill every tensor.

    Raises:
        DataError: a file is missing, damaged or foreign.
    """
    planner = DefaultLoadPlanner(**_DIALECT)
    wanted = {name: tensor for name, tensor in tensors.items() if name in index.tensors}
    planner.set_up_planner(dict(wanted), _dcp_metadata({name: index.tensors[name] for name in wanted}))
    by_shard: dict[int, list[tuple[ReadItem, Chunk]]] = defaultdict(list)
    for item in planner.create_local_plan().items:
        parts = index.tensors[item.storage_index.fqn].chunks
        chunk = next(part for part in parts if torch.Size(part.offsets) == item.storage_index.offset)
        by_shard[chunk.shard].append((item, chunk))
    for number, items in sorted(by_shard.items()):
        with ShardFile(folder, number, index.save_id) as file:
            for item, chunk in items:
                name = item.storage_index.fqn
                box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                part = file.read(name, index.tensors[name].dtype, chunk, box)
                planner.resolve_tensor(item).detach().copy_(part)


def read_rank_values(folder: Path, index: Index, rank: int) -> dict[str, Any]:
    """The plain values that rank `rank` of the ranks that wrote the checkpoint left in its file."""
    with ShardFile(folder, rank, index.save_id) as file:
        return file.rank_values


def _dcp_metadata(entries: Mapping[str, Entry]) -> Metadata:
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[entry.dtype]),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
            )
            for name, entry in entries.items()
        }
    )
