"""Reads and checks the header of a shard file. Reads no tensor and does not import torch.

A safetensors file consists of a length (8 bytes, little endian), a JSON header of that length, and the bytes of the tensors
without gaps. The header's entry `__metadata__` maps strings to strings. Its key `DCP_SHARDING_INFO`, which
torch.distributed.checkpoint defined, stores the offsets of each part in the whole tensor. moe_dist defines the other keys.
"""

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from moe_dist.checkpoint.index import (
    ITEMSIZE,
    CheckpointProblem,
    Chunk,
    DamagedError,
    Length,
    Shape,
    StoredModel,
    shard_file,
)
from moe_dist.config.json_text import bounded
from moe_dist.config.regular_file import open_regular

MAX_HEADER_BYTES = 100_000_000  # safetensors rejects larger headers
# Bounds of a header's JSON. The header has three lists and mappings per tensor, or five in a checkpoint. DeepSeek-V3 has
# 91,000 tensors.
MAX_HEADER_LISTS, MAX_HEADER_VALUES = 1 << 20, 1 << 22
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


class HeaderEntry(StoredModel):
    """The description of one tensor in a safetensors header."""

    dtype: str
    shape: Shape
    data_offsets: Annotated[tuple[Length, Length], Field(strict=False)]


class _Metadata(StoredModel):
    format: str
    DCP_SHARDING_INFO: str
    fingerprints: str
    save_id: str
    step: str
    rank_values: str


# Accepts any values. Each value is checked when it is used, because pydantic would collect the faults of all values.
_VALUES = TypeAdapter(dict[str, JsonValue])
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class ShardHeader:
    """The header of a shard file. The keys of `parts`, `fingerprints` and `ends` are the tensors' logical names."""

    save_id: str
    step: int
    parts: dict[str, tuple[str, Chunk]]  # dtype (a key of ITEMSIZE) and box of the part that this file contains
    fingerprints: dict[str, int]
    ends: dict[str, int]  # offset of the part's end in the file
    rank_values: dict[str, JsonValue]  # the values of the rank that wrote the file
    size: int  # bytes of the file according to its header
    sha256: str  # digest of the header


def metadata_of(
    offsets: dict[str, list[int]], fingerprints: dict[str, str], *, save_id: str, step: int, rank_values: Any
) -> dict[str, str]:
    """Makes a shard file's `__metadata__`. Raises ValueError if `rank_values` has NaN or infinity, as JSON lacks both."""
    return {
        "format": "pt",
        SHARDING: json.dumps({name: {OFFSETS: each} for name, each in offsets.items()}),
        "fingerprints": json.dumps(fingerprints),
        "save_id": save_id,
        "step": str(step),
        "rank_values": json.dumps(dict(rank_values), allow_nan=False),
    }


def read_shard_header(folder: Path, number: int) -> ShardHeader:
    """Reads the header of shard file `number`. Raises DamagedError if the file is missing, is not a shard file, has a
    damaged header, or has another size than the header says."""
    path = folder / shard_file(number)

    def problem(kind: Any, detail: str) -> DamagedError:
        return DamagedError(
            f"checkpoint {folder}: a file differs from what was saved", [CheckpointProblem(kind, path.name, detail)]
        )

    try:
        size = path.stat().st_size  # compared below with the size that the header implies
        with open_regular(path) as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            # Without the limit, a damaged `length` could cause a huge read.
            raw = stream.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    except FileNotFoundError as error:
        raise problem("missing", "does not exist") from error
    except OSError as error:
        raise problem("damaged", f"cannot be read: {error.strerror or error}") from error
    if size <= 8 or (raw[:1] == b"{" and len(raw) < length):
        raise problem("truncated", f"{size:,} bytes, cut short inside its header")
    if raw[:1] != b"{":
        raise problem("foreign", "not a safetensors file (it does not begin with a header)")
    try:
        shard = _parse(start, raw, number)
    except (ValidationError, LookupError, TypeError, ValueError) as error:
        raise problem(*_unreadable(raw, error)) from error
    if size < shard.size:
        lost = [name for name, end in shard.ends.items() if end > size]
        named = f"; lost: {', '.join(lost[:3])}" + (f" and {len(lost) - 3} more" if len(lost) > 3 else "") if lost else ""
        raise problem("truncated", f"{size:,} bytes of {shard.size:,}{named}")
    if size > shard.size:  # safetensors does not notice extra bytes after the last tensor
        raise problem("damaged", f"{size:,} bytes, but its header announces {shard.size:,}")
    return shard


def _parse(start: bytes, raw: bytes, number: int) -> ShardHeader:
    entries = _VALUES.validate_json(bounded(raw, MAX_HEADER_LISTS, MAX_HEADER_VALUES))
    metadata = _Metadata.model_validate(entries.pop("__metadata__"))
    parts = {name: HeaderEntry.model_validate(entry) for name, entry in entries.items()}
    offsets: dict[str, Any] = _VALUES.validate_json(metadata.DCP_SHARDING_INFO)
    sums = {name: _FINGERPRINT.fullmatch(str(each)) for name, each in _VALUES.validate_json(metadata.fingerprints).items()}
    if wrong := [name for name in parts if sums.get(name) is None]:
        raise ValueError(f"{wrong[0]}: no fingerprint")
    end = 0
    for name, part in sorted(parts.items(), key=lambda item: item[1].data_offsets):
        # A gap between two parts is an error, because no fingerprint would cover its bytes.
        if part.data_offsets != (end, end + math.prod(part.shape) * ITEMSIZE[part.dtype]):
            raise ValueError(f"{name}: its byte range {part.data_offsets} does not match {part.dtype} {part.shape}")
        end = part.data_offsets[1]
    before = len(start) + len(raw)
    return ShardHeader(
        save_id=metadata.save_id,
        step=int(metadata.step),
        parts={
            name: (part.dtype, Chunk(shard=number, offsets=offsets[name][OFFSETS], shape=part.shape))
            for name, part in parts.items()
        },
        fingerprints={name: int(sums[name][0], 16) for name in parts},  # pyright: ignore[reportOptionalSubscript]
        ends={name: before + part.data_offsets[1] for name, part in parts.items()},
        rank_values=_VALUES.validate_json(metadata.rank_values),
        size=before + end,
        sha256=hashlib.sha256(start + raw).hexdigest(),
    )


def _unreadable(raw: bytes, error: Exception) -> tuple[str, str]:
    """Returns kind and details of an invalid header's problem. If moe_dist wrote the file, the kind is damaged, else
    foreign."""
    detail = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else repr(error)
    if b'"save_id"' in raw or b'"fingerprints"' in raw:
        return "damaged", f"its header is invalid: {detail}"
    return "foreign", "a safetensors file, but not of a moe_dist checkpoint (no save_id in its header)"
