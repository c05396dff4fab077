"""Opens a Hugging Face folder for an import. Reads only config.json and the folder's safetensors files, and runs no code.

Tensors are read with ordinary reads instead of memory mapping, because a mapped file would count against the process's
memory limit.
"""

import hashlib
import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from moe_dist.checkpoint.shard_header import MAX_HEADER_BYTES, MAX_HEADER_LISTS, MAX_HEADER_VALUES, HeaderEntry
from moe_dist.config.json_text import bounded
from moe_dist.errors import DataError
from moe_dist.hf.fields import read_object

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
# Files that an import copies along with config.json. Of these files, only tokenizer.json is also read.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
COMPANION_BYTES = 1 << 27  # largest allowed size of each such file; the largest known tokenizers have 35 MB
CONFIG_BYTES, MOST_FIELDS = 16 << 20, 10_000  # limits for a configuration file's size and config.json's number of fields
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

AGAIN = "copy or download it again"  # advice in error messages about a damaged file

_MOST_FILES = 10_000  # largest number of files with weights; DeepSeek-V3 has 163
_DIGESTED = 1024  # number of a tensor's first elements in `weights_digest`
_DERIVED = re.compile(r".*\.rotary_emb\.inv_freq")  # name of a buffer in old Llama checkpoints, which is ignored
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*\.safetensors")  # a file name, not a path to another folder


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file of the folder."""

    file: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int  # offset of the first byte in the file


@dataclass(frozen=True)
class Source:
    """An opened Hugging Face folder."""

    folder: Path
    config: Mapping[str, Any]  # content of config.json
    tensors: Mapping[str, Stored]
    files: Mapping[str, tuple[int, int, str]]  # safetensors files: size in bytes, time of change, digest of the header
    pickles: Sequence[str]  # pickle files, which are never opened, because reading them can run code
    companions: Sequence[str]  # files of COMPANIONS that the folder contains

    def read(self, name: str, begin: int, shape: Sequence[int], strides: Sequence[int] = ()) -> Tensor:
        """Reads elements of the tensor `name`, starting with element `begin` in row-major order, as a tensor of shape
        `shape`. `strides` are the distances between elements along each dim; elements in between are read and dropped.
        Raises DataError if the file cannot be read, or if it has become shorter since its header was read."""
        if strides:
            span = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
            return self.read(name, begin, (span,)).as_strided(tuple(shape), tuple(strides))
        stored = self.tensors[name]
        tensor = torch.empty(tuple(shape), dtype=DTYPES[stored.dtype])
        view = tensor.flatten().view(torch.uint8).numpy().data
        at, path = stored.begin + begin * tensor.element_size(), self.folder / stored.file
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(at)
                while view and (count := stream.readinto(view)):  # an unbuffered read may return fewer bytes
                    view = view[count:]
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        if view:
            raise DataError(f"{path}: became shorter while it was read, inside {name}")
        return tensor


def open_source(folder: Path) -> Source:
    """Opens a folder, and reads config.json and the header of every safetensors file. Raises one DataError with all
    problems: there are no safetensors files; a file is missing, truncated or outside the folder; a tensor is not in the
    file that the index names, or its dtype is not in DTYPES."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    config = read_configuration(folder, CONFIG_FILE)
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    index = _weight_map(folder, names, pickles)
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for name, file in (index or {}).items():
        wanted[file].add(name)
    tensors: dict[str, Stored] = {}
    files: dict[str, tuple[int, int, str]] = {}
    problems: list[str] = []
    for file in sorted(wanted) if index is not None else [WEIGHTS_FILE]:
        try:
            path = inside(folder, file)
            found, digest = _read_header(path)
        except DataError as error:
            problems += error.problems
            continue
        status = path.stat()
        files[file] = (status.st_size, status.st_mtime_ns, digest)
        for name, stored in found.items():
            if index is not None and index.get(name) != file:
                problems.append(f"{path}: holds {name}, of which {INDEX_FILE} says {index.get(name, 'nothing')}")
            elif stored.dtype not in DTYPES and not _DERIVED.fullmatch(name):
                problems.append(
                    f"{path}: {name} is of dtype {stored.dtype}; weights must be {', '.join(DTYPES)}, not quantised; "
                    "save the model in one of these (transformers: model.to(torch.bfloat16).save_pretrained)"
                )
            elif not _DERIVED.fullmatch(name):
                tensors[name] = stored
        lost = sorted(wanted[file] - found.keys())
        problems += [f"{path}: {name} is missing, which {INDEX_FILE} says is in it; {AGAIN}" for name in lost]
    if problems:
        raise DataError(problems, see="docs/huggingface.md")
    companions = [name for name in COMPANIONS if name in names and companion(folder, name)]
    return Source(folder, config, tensors, files, pickles, companions)


def weights_digest(folder: Path) -> str:
    """Returns a SHA-256 over the name, dtype, shape and first elements of every tensor in a folder. Training changes the
    digest; another division into files does not. Raises the DataErrors of `open_source` and `Source.read`."""
    source, digest = open_source(folder), hashlib.sha256()
    for name, stored in sorted(source.tensors.items()):
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        first = source.read(name, 0, (min(math.prod(stored.shape), _DIGESTED),))
        digest.update(first.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_configuration(folder: Path, name: str) -> dict[str, Any]:
    """Reads config.json or another configuration file of a folder. Raises DataError if the file is missing, is no JSON
    object, or is too large for a configuration."""
    values = read_object(inside(folder, name), "configuration", CONFIG_BYTES)
    if name == CONFIG_FILE and len(values) > MOST_FIELDS:
        raise DataError(f"{folder / name}: has {len(values):,} fields, and a model's configuration has a few hundred")
    return values


def inside(folder: Path, name: str) -> Path:
    """Returns the path of the file `name` in the folder. In a snapshot of the hub's cache, <model>/snapshots/<revision>,
    the file may be a link to a file in <model>/blobs. Raises DataError if the path does not exist, is no file, or is a link
    to any other place outside the folder."""
    path, real = folder / name, folder.resolve()
    allowed = [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise DataError(f"{path}: leads out of the folder, to {path.resolve()}; give a copy of the folder made with cp -rL")
    if not path.is_file():
        raise DataError(f"{path}: {'is no file' if path.exists() else 'is missing'}; {AGAIN}")
    return path


def companion(folder: Path, name: str) -> Path:
    """Returns the path of a file that an import copies. Raises the DataErrors of `inside`, and a DataError if the file is
    too large."""
    path = inside(folder, name)
    if (size := path.stat().st_size) > COMPANION_BYTES:
        raise DataError(f"{path}: {size:,} bytes, too large to be copied along; at most {COMPANION_BYTES:,}")
    return path


def _weight_map(folder: Path, names: Sequence[str], pickles: Sequence[str]) -> Mapping[str, str] | None:
    """Maps each tensor's name to a file name, according to the index. Returns None if there is one file and no index."""
    safe = [name for name in names if name.endswith(".safetensors")]
    if INDEX_FILE not in names:
        if WEIGHTS_FILE in names:
            return None
        if safe:
            raise DataError(f"{folder}: {INDEX_FILE} is missing, which says what is in {', '.join(safe[:3])}; {AGAIN}")
        if pickles:
            raise DataError(
                f"{folder}: {', '.join(pickles[:3])}: pickled weights can run code and are never read; save the model as "
                "safetensors (save_pretrained of transformers 4.34 and later does)"
            )
        raise DataError(
            f"{folder}: there is no {WEIGHTS_FILE} and no {INDEX_FILE} in it; give a folder as save_pretrained writes it"
        )
    index = read_weight_map(folder)
    if WEIGHTS_FILE in names and set(index.values()) != {WEIGHTS_FILE}:
        raise DataError(
            f"{folder}: both {WEIGHTS_FILE} and {INDEX_FILE} are in it, and transformers reads {WEIGHTS_FILE} alone; "
            "remove the one that is not of this model"
        )
    return index


def read_weight_map(folder: Path) -> Mapping[str, str]:
    """Maps each tensor's name to a file name, according to the folder's index. Raises DataError if the index is missing or
    damaged, or if a name leads out of the folder."""
    found = read_object(inside(folder, INDEX_FILE), "index").get("weight_map")
    if not isinstance(found, dict) or not found:
        raise DataError(f"{folder / INDEX_FILE}: has no weight_map, the file of each tensor; {AGAIN}")
    if len(files := set(map(str, found.values()))) > _MOST_FILES:
        raise DataError(f"{folder / INDEX_FILE}: names {len(files):,} files, more than {_MOST_FILES:,}; {AGAIN}")
    odd = [f"{name} in {file!r:.80}" for name, file in found.items() if not _PLAIN.fullmatch(str(file))]
    if odd:
        raise DataError(
            f"{folder / INDEX_FILE}: files must be plain names of .safetensors in the same folder, not {', '.join(odd[:3])}"
        )
    return found


def _read_header(path: Path) -> tuple[dict[str, Stored], str]:
    """Returns a safetensors file's tensors by name, and the digest of its header. Checks that its size fits the header."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        raw = stream.read(length) if 0 < length <= MAX_HEADER_BYTES else b""
    if len(start) < 8 or (len(raw) < length and length <= MAX_HEADER_BYTES):
        raise DataError(f"{path}: {size:,} bytes, cut short inside its header; {AGAIN}")
    try:
        entries = TypeAdapter(dict[str, Any]).validate_json(bounded(raw, MAX_HEADER_LISTS, MAX_HEADER_VALUES))
        entries.pop("__metadata__", None)
        parts = {name: HeaderEntry.model_validate(entry) for name, entry in entries.items()}
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path}: no safetensors file: {str(error).splitlines()[0]}; {AGAIN}") from error
    end, before = 0, 8 + length
    for name, part in sorted(parts.items(), key=lambda item: item[1].data_offsets):
        begin, stop = part.data_offsets
        count = math.prod(part.shape)
        width = DTYPES[part.dtype].itemsize if part.dtype in DTYPES else None
        if begin != end or stop < begin or (width is not None and stop - begin != count * width):
            raise DataError(
                f"{path}: the bytes {begin} to {stop} of {name} are not those of {part.dtype} {part.shape}; {AGAIN}"
            )
        end = stop
    if size != before + end:
        problem = "truncated" if size < before + end else "longer than it says"
        raise DataError(f"{path}: {problem}: {size:,} bytes, its header announces {before + end:,}; {AGAIN}")
    stored = {
        name: Stored(path.name, part.dtype, part.shape, before + part.data_offsets[0]) for name, part in parts.items()
    }
    return stored, hashlib.sha256(start + raw).hexdigest()
