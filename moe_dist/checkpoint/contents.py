"""Reads and checks the index, state file and shard headers of a checkpoint. Reads no tensor and does not import torch.

Every file of a checkpoint except SHA256SUMS can be checked. SHA256SUMS, a file for `sha256sum -c`, contains the digests of
index.json and state.json. index.json contains the digest of each shard's header (ShardEntry). A shard's header contains the
fingerprint of each tensor part in the shard.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from moe_dist.checkpoint.directory import step_of
from moe_dist.checkpoint.index import (
    INDEX_FILE,
    STATE_FILE,
    CheckpointProblem,
    DamagedError,
    Index,
    StateFile,
    read_index,
    read_stored,
    shard_file,
)
from moe_dist.checkpoint.shard_header import ShardHeader, read_shard_header
from moe_dist.config.regular_file import read_regular
from moe_dist.errors import DataError

CHECKSUMS_FILE = "SHA256SUMS"
CHECKED_FILES = (INDEX_FILE, STATE_FILE)
T = TypeVar("T")

_MAX_BYTES = 4096  # largest number of bytes that are read from SHA256SUMS; a valid file has about 200 bytes


@dataclass(frozen=True)
class Contents:
    """The content of a checkpoint's index.json and state.json. Both files are intact and belong to the same save."""

    folder: Path
    index: Index
    state: StateFile


@dataclass
class Examined:
    """The parts of a checkpoint that were readable, and the problems of the checkpoint's files."""

    index: Index | None = None
    state: StateFile | None = None
    headers: dict[int, ShardHeader] = field(default_factory=dict)  # headers of the intact shards, by shard number
    file_problems: list[CheckpointProblem] = field(default_factory=list)


def open_checkpoint(folder: Path) -> Contents:
    """Reads index.json and state.json of a checkpoint. Checks their digests, and that both files belong to the same save
    and step. Raises DamagedError if a file is missing or damaged, or if the files belong to different saves. The error
    names each faulty file."""
    examined = examine_files(folder)
    if examined.file_problems or examined.index is None or examined.state is None:
        raise DamagedError(f"checkpoint {folder} differs from what was saved", examined.file_problems)
    return Contents(folder, examined.index, examined.state)


def open_shard(contents: Contents, number: int) -> ShardHeader:
    """Reads the header of shard `number`, and compares the header with the index. Raises DamagedError if the shard is
    missing or damaged, belongs to another save, or has a header that differs from the index."""
    header = read_shard_header(contents.folder, number)
    if problem := shard_problem(contents.index, number, header):
        raise DamagedError(f"checkpoint {contents.folder} differs from what was saved", [problem])
    return header


def examine(folder: Path) -> Examined:
    """Checks all files of a checkpoint except the tensors in them, and collects all problems."""
    examined = examine_files(folder)
    if examined.index is None:
        return examined
    for number in range(examined.index.num_shards):
        try:
            header = read_shard_header(folder, number)
        except DamagedError as error:
            examined.file_problems += error.file_problems
            continue
        if problem := shard_problem(examined.index, number, header):
            examined.file_problems.append(problem)
        else:
            examined.headers[number] = header
    known = {shard_file(number) for number in range(examined.index.num_shards)}
    for path in sorted(folder.glob("shard_*.safetensors")):
        if path.name not in known:
            examined.file_problems.append(CheckpointProblem("foreign", path.name, f"{INDEX_FILE} does not list this file"))
    return examined


def examine_files(folder: Path) -> Examined:
    """Checks index.json, state.json and SHA256SUMS, but no shard."""
    examined = Examined()
    problems = examined.file_problems

    def read(name: str, function: Callable[[], T]) -> T | None:
        if not (folder / name).exists():
            problems.append(CheckpointProblem("missing", name, "does not exist"))
            return None
        try:
            return function()
        except DataError as error:
            problems.append(CheckpointProblem("damaged", name, str(error)))

    examined.index = read(INDEX_FILE, lambda: read_index(folder))
    examined.state = read(STATE_FILE, lambda: read_stored(folder / STATE_FILE, StateFile))
    _examine_saves(folder, examined, read(CHECKSUMS_FILE, lambda: _read_checksums(folder)))
    named = step_of(folder)
    if examined.index and named is not None and named != examined.index.step:
        detail = f"the checkpoint is of step {examined.index.step}, but its folder is named step_{named}"
        problems.append(CheckpointProblem("mixed up", INDEX_FILE, detail))
    return examined


def shard_problem(index: Index, number: int, header: ShardHeader) -> CheckpointProblem | None:
    """Compares the header of shard `number` with the index. Returns the first difference; None if they agree."""
    name = shard_file(number)
    if header.save_id != index.save_id:  # comes first, because a shard of another save also fails the later checks
        whose = f"of save {header.save_id} at step {header.step}; the checkpoint is {index.save_id} at step {index.step}"
        if all(part in index.tensors and index.tensors[part].dtype == dtype for part, (dtype, _) in header.parts.items()):
            return CheckpointProblem("mixed up", name, whose)
        return CheckpointProblem("foreign", name, f"{whose}; it belongs to another model")
    shard = index.shards[number]
    if header.sha256 != shard.header_sha256 or header.size != shard.size:  # differs also if two ranks' files were swapped
        detail = "its header differs from the one that was saved; perhaps it is another rank's file"
        return CheckpointProblem("damaged", name, detail)
    for part, (dtype, chunk) in header.parts.items():
        entry = index.tensors.get(part)
        if entry is None or entry.dtype != dtype or chunk not in entry.chunks:
            return CheckpointProblem("damaged", name, f"contains a part that {INDEX_FILE} does not list", part)
    return None


def _examine_saves(folder: Path, examined: Examined, checksums: tuple[str, dict[str, str]] | None) -> None:
    """Checks that the JSON files belong to the same save and match the digests in SHA256SUMS."""
    problems = examined.file_problems
    ids = {INDEX_FILE: examined.index and examined.index.save_id, STATE_FILE: examined.state and examined.state.save_id}
    ids[CHECKSUMS_FILE] = checksums and checksums[0]
    said = {name: save_id for name, save_id in ids.items() if save_id}
    if len(set(said.values())) > 1:  # returns now, because digests of files from different saves never match
        common, count = Counter(said.values()).most_common(1)[0]
        odd = {name for name, save_id in said.items() if save_id != common} if count > 1 else set(said)
        text = ", ".join(f"{name} of save {save_id}" for name, save_id in said.items())
        problems += [
            CheckpointProblem("mixed up", name, f"belongs to another save than the rest: {text}") for name in sorted(odd)
        ]
        return
    if examined.index and examined.state and examined.index.step != examined.state.step:
        steps = f"is of step {examined.index.step}, {STATE_FILE} of step {examined.state.step}"
        problems.append(CheckpointProblem("damaged", INDEX_FILE, steps))
    faulty = {problem.file for problem in problems}  # files whose digests are not checked
    for name, digest in (checksums[1] if checksums else {}).items():
        path = folder / name
        if name not in faulty and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            detail = f"differs from what was saved: its digest is not the one in {CHECKSUMS_FILE}"
            problems.append(CheckpointProblem("damaged", name, detail))


def checksums_of(contents: dict[str, bytes], save_id: str) -> bytes:
    """Returns the content of SHA256SUMS: a comment line with the save id, then a line with each checked file's digest."""
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in CHECKED_FILES]
    return "".join([f"# save {save_id}\n", *lines]).encode()


def _read_checksums(folder: Path) -> tuple[str, dict[str, str]]:
    """Returns the save id and each file's digest from SHA256SUMS."""
    try:
        text = read_regular(folder / CHECKSUMS_FILE, most_bytes=_MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    pattern = rb"# save ([0-9a-f]+)\n" + b"".join(
        rb"([0-9a-f]{64})  %s\n" % re.escape(name.encode()) for name in CHECKED_FILES
    )
    if (match := re.fullmatch(pattern, text)) is None:
        raise DataError("is malformed")
    save_id, *digests = (group.decode() for group in match.groups())
    return save_id, dict(zip(CHECKED_FILES, digests, strict=True))
