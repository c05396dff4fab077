"""The table of contents of a checkpoint: which file holds which part of each logical tensor. JSON, checked when read."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.checkpoint.state import TensorSpec
from moe_dist.errors import ConfigError, DataError

INDEX_FILE = "index.json"
MAX_FAULTS = 20  # listed in one message

# safetensors' names of the dtypes that checkpoints hold.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_Size = Annotated[int, Field(ge=0)]


class StoredModel(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Chunk(StoredModel):
    """A box of a tensor in the shard file of that number."""

    shard: _Size
    offsets: tuple[_Size, ...]
    shape: tuple[_Size, ...]


class Entry(StoredModel):
    """One logical tensor: its dtype (a key of DTYPES), whole shape, and the boxes it is made of."""

    dtype: str
    shape: tuple[_Size, ...]
    chunks: tuple[Chunk, ...]


class Index(StoredModel):
    """Everything in a checkpoint.

    Attributes:
        save_id: Drawn anew for each save; all files of a checkpoint carry it, so that mixed-up ones are told apart.
        num_shards: Shard files, one for each rank that wrote.
    """

    format: Literal[1] = 1
    save_id: str
    step: _Size
    num_shards: _Size
    tensors: dict[str, Entry]


def shard_file(number: int) -> str:
    """Name of a shard file. Made from a number, so that no index can point outside of its folder."""
    return f"shard_{number:05d}.safetensors"


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        DataError: it is missing or damaged, or a tensor's boxes do not fill it exactly once.
    """
    path = folder / INDEX_FILE
    try:
        index = Index.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"checkpoint {folder}: cannot read {INDEX_FILE}: {error}") from error
    faults = index_faults(index)
    if faults:
        raise DataError(_listed(f"checkpoint {folder}: {INDEX_FILE} is damaged", faults))
    return index


def index_faults(index: Index) -> list[str]:
    """Tensors that the boxes do not fill exactly once, or that name unknown dtypes or shards."""
    faults = []
    for name, entry in index.tensors.items():
        if entry.dtype not in DTYPES:
            faults.append(f"{name}: unknown dtype {entry.dtype!r}")
        if any(chunk.shard >= index.num_shards for chunk in entry.chunks):
            faults.append(f"{name}: names a shard beyond the {index.num_shards} there are")
        if not _filled_once(entry):
            boxes = [(chunk.shard, chunk.offsets, chunk.shape) for chunk in entry.chunks]
            faults.append(f"{name}: shape {entry.shape} is not filled exactly once by (shard, offsets, shape) {boxes}")
    return faults


def _filled_once(entry: Entry) -> bool:
    """Whether the boxes tile the shape; boxes differ along one dim at most, which is how all layouts here cut tensors."""
    if 0 in entry.shape:
        return not entry.chunks
    rank = len(entry.shape)
    if not entry.chunks or any(len(c.shape) != rank or len(c.offsets) != rank for c in entry.chunks):
        return False
    cut = {d for chunk in entry.chunks for d in range(rank) if chunk.shape[d] != entry.shape[d]}
    if len(cut) > 1 or any(chunk.offsets[d] for chunk in entry.chunks for d in range(rank) if d not in cut):
        return False
    if not cut:
        return len(entry.chunks) == 1
    (dim,) = cut
    end = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets[dim]):
        if chunk.offsets[dim] != end or chunk.shape[dim] == 0:
            return False
        end += chunk.shape[dim]
    return end == entry.shape[dim]


def differences(index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> list[str]:
    """What a checkpoint and a model do not share: missing, surplus, other shape, other dtype; one line a tensor."""
    faults = []
    for name, spec in specs.items():
        entry = index.tensors.get(name)
        if not math.prod(spec.shape):
            continue  # nothing to keep, as the null experts of a group that has none
        if entry is None:
            faults.append(f"{name}: the model has it, the checkpoint does not")
        elif entry.shape != spec.shape:
            faults.append(f"{name}: shape {spec.shape} in the model, {entry.shape} in the checkpoint")
        elif DTYPES.get(entry.dtype) != spec.dtype:
            faults.append(f"{name}: {spec.dtype} in the model, {entry.dtype} in the checkpoint")
    surplus = index.tensors.keys() - specs.keys()
    faults += [
        f"{name}: the checkpoint has it, the model does not"
        for name in sorted(surplus)
        if ignore_prefix is None or not name.startswith(ignore_prefix)
    ]
    return faults


def check_fits(folder: Path, index: Index, specs: Mapping[str, TensorSpec], *, ignore_prefix: str | None = None) -> None:
    """Refuses a checkpoint of another model.

    Raises:
        ConfigError: with all that differs.
    """
    faults = differences(index, specs, ignore_prefix=ignore_prefix)
    if faults:
        raise ConfigError(
            _listed(
                f"checkpoint {folder} is of another model ({len(faults)} tensors differ); resume with the configuration it "
                "was written with (config.yaml of its run), or start a new run",
                faults,
            )
        )


def check_complete(index: Index, specs: Mapping[str, TensorSpec]) -> None:
    """Before a commit: every tensor of the model is in the index exactly once. A fault is a bug of ours."""
    faults = index_faults(index) + differences(index, specs)
    if faults:
        raise AssertionError(_listed("the written shards are not the whole state", faults))


def _listed(head: str, faults: list[str]) -> str:
    shown = faults[:MAX_FAULTS]
    more = [f"and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
    return "\n  - ".join([head + ":", *shown, *more])
