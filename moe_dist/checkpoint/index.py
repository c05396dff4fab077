"""The table of contents of a checkpoint: which file holds which part of each logical tensor. JSON, checked when read.

Imports no torch: a checkpoint can be looked at where there is none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.errors import DataError

INDEX_FILE = "index.json"
FORMAT = 2  # 1 had no fingerprints
MAX_FAULTS = 20  # listed in one message
MAX_JSON_BYTES = 1 << 28  # an index of 64 layers x 128 experts has 16 MB; a larger file is none of ours

# safetensors' names of the dtypes that checkpoints hold, with their bytes an element.
ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}

_Size = Annotated[int, Field(ge=0)]


class StoredModel(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


M = TypeVar("M", bound=StoredModel)


class Chunk(StoredModel):
    """A box of a tensor in the shard file of that number."""

    shard: _Size
    offsets: tuple[_Size, ...]
    shape: tuple[_Size, ...]


class Entry(StoredModel):
    """One logical tensor.

    Attributes:
        dtype: A key of ITEMSIZE.
        shape: Of the whole.
        fingerprint: Of the whole, whatever pieces it was written in, see `moe_dist.checkpoint.fingerprint`; 16 hex digits.
        chunks: The boxes it is made of.
    """

    dtype: str
    shape: tuple[_Size, ...]
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    chunks: tuple[Chunk, ...]


class ShardEntry(StoredModel):
    """One shard file: its size, and the SHA-256 of its header. What follows the header is guarded by the fingerprints."""

    size: _Size
    header_sha256: str


class Index(StoredModel):
    """Everything in a checkpoint.

    Attributes:
        save_id: Drawn anew for each save; all files of a checkpoint carry it, so that mixed-up ones are told apart.
        shards: One for each rank that wrote.
    """

    format: Literal[2] = FORMAT
    save_id: str
    step: _Size
    shards: tuple[ShardEntry, ...]
    tensors: dict[str, Entry]

    @property
    def num_shards(self) -> int:
        return len(self.shards)


def shard_file(number: int) -> str:
    """Name of a shard file. Made from a number, so that no index can point outside of its folder."""
    return f"shard_{number:05d}.safetensors"


def read_stored(path: Path, model: type[M]) -> M:
    """A JSON file of a checkpoint, held against its schema.

    Raises:
        DataError: it is missing, too large to be one, of another format or damaged; names it.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataError(f"checkpoint file {path}: {path.stat().st_size:,} bytes, too large to be one")
        content = path.read_bytes()
        return model.model_validate_json(content)
    except OSError as error:
        raise DataError(f"checkpoint file {path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        if where == "format":
            raise DataError(
                f"checkpoint file {path}: of format {first['input']!r}, this version reads {FORMAT}; go on with the "
                "version of moe_dist in provenance.json"
            ) from error
        raise DataError(f"checkpoint file {path}: damaged: {where + ': ' if where else ''}{first['msg']}") from error


def read_index(folder: Path) -> Index:
    """The index of a checkpoint.

    Raises:
        DataError: it is missing or damaged, or a tensor's boxes do not fill it exactly once.
    """
    index = read_stored(folder / INDEX_FILE, Index)
    problems = index_problems(index)
    if problems:
        raise DataError(listed(f"checkpoint {folder}: {INDEX_FILE} is damaged", problems))
    return index


def index_problems(index: Index) -> list[str]:
    """Tensors that the boxes do not fill exactly once, or that name unknown dtypes or shards."""
    problems = []
    for name, entry in index.tensors.items():
        if entry.dtype not in ITEMSIZE:
            problems.append(f"{name}: unknown dtype {entry.dtype!r}")
        if any(chunk.shard >= index.num_shards for chunk in entry.chunks):
            problems.append(f"{name}: names a shard beyond the {index.num_shards} there are")
        if not _filled_once(entry):
            boxes = [(chunk.shard, chunk.offsets, chunk.shape) for chunk in entry.chunks]
            problems.append(f"{name}: shape {entry.shape} is not filled exactly once by (shard, offsets, shape) {boxes}")
    return problems


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


def listed(head: str, problems: Sequence[str]) -> str:
    """A head line and the first MAX_FAULTS faults under it."""
    shown = list(problems[:MAX_FAULTS])
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n  - ".join([head + ":", *shown, *more])
