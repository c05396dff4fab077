"""Defines, reads and checks the JSON files of a checkpoint. index.json lists the shard files that contain the parts of each
logical tensor. state.json contains everything except tensors. Imports no torch, so that login nodes can inspect
checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from moe_dist.config import yaml_text
from moe_dist.config.json_text import MAX_LISTS, bounded, first_fault
from moe_dist.config.regular_file import read_regular
from moe_dist.config.stored_format import translate
from moe_dist.errors import DataError, printable

INDEX_FILE, STATE_FILE = "index.json", "state.json"
FORMAT = 2  # version of the checkpoint format; version 1 had no fingerprints
MAX_FAULTS = 20  # largest number of problems that a message lists
MAX_JSON_BYTES = 1 << 27
LONGEST_NAME = 1000  # largest number of characters of a tensor's name
SHOWN_BOXES = 3  # largest number of a tensor's parts that a message shows

# Bytes per element of each dtype that a checkpoint can contain, by the dtype's name in safetensors files.
ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


class StoredModel(BaseModel):
    most_lists: ClassVar[int] = MAX_LISTS  # largest number of lists and mappings in the file

    # Unknown keys are ignored, because pydantic would collect the faults of millions of keys.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


M = TypeVar("M", bound=StoredModel)
Length = Annotated[int, Field(ge=0, lt=1 << 63)]
Steps = Annotated[int, Field(ge=0, lt=1 << 53)]  # a number of steps; the bound keeps it exact in float64
Shape = Annotated[tuple[Length, ...], FailFast(), Field(max_length=8, strict=False)]  # strict=False also accepts a list


class Chunk(StoredModel):
    """A part of a tensor. The shard file `shard` contains it. The part is a box with an offset and a length in each dim."""

    shard: NonNegativeInt
    offsets: Shape
    shape: Shape


class Entry(StoredModel):
    """One logical tensor. `dtype`, `shape` and `fingerprint` describe the whole tensor."""

    dtype: str  # a key of ITEMSIZE
    shape: Shape
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]  # see `moe_dist.checkpoint.fingerprint`
    # Together the chunks contain each element of the tensor exactly once.
    chunks: Annotated[tuple[Chunk, ...], FailFast(), Field(strict=False)]


@dataclass(frozen=True)
class Cut:
    """A part of the stored tensor `name`. The part begins at index `start` of dim `dim`. In `dim` it is as long as the
    tensor into which it is loaded."""

    name: str
    dim: int
    start: int

    def offsets(self, num_dims: int) -> tuple[int, ...]:
        """Returns the index at which the part begins in each dim of the whole tensor: `start` in `dim`, 0 elsewhere."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(num_dims))


Source = str | Cut  # name of the stored tensor, or part of a stored tensor, that is loaded into a tensor of the model


def stored_name(source: Source) -> str:
    return source if isinstance(source, str) else source.name


class ShardEntry(StoredModel):
    """Size in bytes and header digest of one shard file. The digest does not cover the tensors; fingerprints do."""

    size: NonNegativeInt
    header_sha256: str


class Index(StoredModel):
    """Content of index.json."""

    format: Literal[2] = FORMAT
    save_id: str  # random id of the save, stored in each of its files, to detect a mix of files of several saves
    step: NonNegativeInt
    shards: Annotated[tuple[ShardEntry, ...], FailFast()]  # indexed by shard number; each rank of the save wrote one shard
    tensors: dict[str, Entry]

    @field_validator("tensors", mode="wrap")
    @classmethod
    def _in_batches(cls, tensors: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """Validates 10,000 entries at a time; otherwise pydantic would collect the faults of millions of entries."""
        if not isinstance(tensors, dict):
            return validate(tensors)
        entries, found = iter(tensors.items()), {}
        while batch := dict(islice(entries, 10_000)):
            found |= validate(batch)
        return found

    @property
    def num_shards(self) -> int:
        return len(self.shards)


class StateFile(StoredModel):
    """Content of state.json."""

    most_lists: ClassVar[int] = 1 << 18

    format: Literal[2] = FORMAT
    save_id: str
    step: Steps
    world_size: PositiveInt
    optimizer_steps: Steps | None  # number of steps that the optimizer has taken; None without an optimizer
    placement: dict[str, JsonValue]  # expert groups and each rank's experts, only for display
    versions: dict[str, JsonValue]  # only for display
    values: dict[str, JsonValue]  # see `CheckpointState.values`

    @field_validator("values")
    @classmethod
    def _in_present_format(cls, values: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not few_values(values.get("config"), most=2 * yaml_text.MAX_VALUES):  # defaults double the size
            raise ValueError(f"config has more than {2 * yaml_text.MAX_VALUES:,} values")
        return {name: translate(value) if name == "config" else value for name, value in values.items()}

    def to_json(self) -> bytes:
        """Returns the content of state.json. Raises ValueError for NaN and infinity, because JSON has no such numbers."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False).encode()


def few_values(value: JsonValue, *, most: int) -> bool:
    """Returns whether a JSON value consists of at most `most` values. Each list, each mapping and each value inside them
    counts as one."""
    count, waiting = 0, [value]
    while waiting and count <= most:
        count, each = count + 1, waiting.pop()
        waiting += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
    return count <= most


def shard_file(number: int) -> str:
    """Returns the name of shard file `number`. An index stores numbers, not names, so it cannot name other files."""
    return f"shard_{number:05d}.safetensors"


def read_stored(path: Path, model: type[M]) -> M:
    """Reads the JSON file `path` of a checkpoint and validates it as `model`. Raises DataError if the file is missing, too
    large or damaged, or has another format version."""
    try:
        return model.model_validate_json(bounded(read_regular(path, most_bytes=MAX_JSON_BYTES), model.most_lists))
    except OSError as error:
        raise DataError(f"checkpoint file {path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["loc"] == ("format",):
            raise DataError(
                f"checkpoint file {path}: format {first['input']!r:.80}, but this version reads {FORMAT}; use the version "
                "of moe_dist in provenance.json"
            ) from error
        raise DataError(f"checkpoint file {path}: damaged: {first_fault(error)}") from error
    except ValueError as error:  # raised by `bounded`
        raise DataError(f"checkpoint file {path}: damaged: {error}") from error


def read_index(folder: Path) -> Index:
    """Reads and checks the index of a checkpoint. Raises DataError if the index is missing or damaged, or has one of the
    problems of `index_problems`."""
    index = read_stored(folder / INDEX_FILE, Index)
    if problems := index_problems(index):
        raise DataError(listed(f"checkpoint {folder}: {INDEX_FILE} is damaged", problems))
    return index


def index_problems(index: Index) -> list[str]:
    """Returns one line of text per problem. A problem is an unknown dtype, an unknown shard number, or parts that do not
    contain each element exactly once."""
    problems = []
    for name, entry in index.tensors.items():
        if len(name) > LONGEST_NAME:  # patterns of names take time that is quadratic in the length
            problems.append(f"{name[:LONGEST_NAME]}...: a name has at most {LONGEST_NAME:,} characters")
            continue
        if entry.dtype not in ITEMSIZE:
            problems.append(f"{name}: unknown dtype {entry.dtype!r}")
        if any(chunk.shard >= index.num_shards for chunk in entry.chunks):
            problems.append(f"{name}: names a shard number that is not below the number of shards, {index.num_shards}")
        if not _filled_once(entry):
            boxes = [(chunk.shard, chunk.offsets, chunk.shape) for chunk in entry.chunks[:SHOWN_BOXES]]
            more = f" and {len(entry.chunks) - SHOWN_BOXES:,} more" if len(entry.chunks) > SHOWN_BOXES else ""
            covered = f"is not covered exactly once by (shard, offsets, shape) {boxes}{more}"
            problems.append(f"{name}: shape {entry.shape} {covered}")
    return problems


def _filled_once(entry: Entry) -> bool:
    """Returns whether the parts contain each element exactly once. Returns False if the parts divide more than one dim,
    because no layout of ranks divides a tensor in two dims."""
    if 0 in entry.shape:  # a tensor without elements has no stored part
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
    """Returns the line `head`, followed by the first MAX_FAULTS problems, one per line."""
    shown = list(problems[:MAX_FAULTS])
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n  - ".join([head + ":", *shown, *more])


Kind = Literal["missing", "truncated", "damaged", "mixed up", "foreign", "incomplete", "not finite"]


@dataclass(frozen=True)
class CheckpointProblem:
    """One problem of a checkpoint.

    Attributes:
        kind: missing (a file does not exist), truncated (a file is cut short), damaged (bits changed), mixed up (a file is
            of another save, or the folder's name has another step), foreign (not a file or tensor of this model's
            checkpoint), incomplete (a tensor is missing), not finite (a tensor contains nan or inf).
    """

    kind: Kind
    file: str  # name of a file in the checkpoint's folder; empty if the problem concerns the whole checkpoint
    detail: str
    tensor: str = ""  # logical name of a tensor; empty if the problem concerns a file

    def __str__(self) -> str:
        return printable(f"{self.kind}: {': '.join(part for part in (self.file, self.tensor, self.detail) if part)}")


class DamagedError(DataError):
    """Raised if a checkpoint differs from the checkpoint that was saved. `file_problems` lists the differences."""

    def __init__(self, head: str, problems: Sequence[CheckpointProblem], *, fix: str = "") -> None:
        self.head, self.file_problems = head, tuple(problems)
        text = listed(head, [str(problem) for problem in problems])
        super().__init__(text + (f"\n{fix}" if fix else ""), see="docs/checkpoints.md")
