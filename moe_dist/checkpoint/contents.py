"""What a checkpoint holds, read without torch and without its tensors: index, state, and the headers of its shards.

Everything that can be known to be wrong without reading a tensor is found here, for the loader and for the tools.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moe_dist.checkpoint.checksums import SEAL_FILE, digest_of, read_seal
from moe_dist.checkpoint.directory import step_of
from moe_dist.checkpoint.index import INDEX_FILE, Index, read_index, read_stored, shard_file
from moe_dist.checkpoint.problems import CheckpointProblem, DamagedError
from moe_dist.checkpoint.shard_header import ShardHeader, read_shard_header
from moe_dist.checkpoint.state_file import STATE_FILE, StateFile
from moe_dist.errors import DataError


@dataclass(frozen=True)
class Contents:
    """The JSON files of a checkpoint, found to be whole and of one save."""

    folder: Path
    index: Index
    state: StateFile


@dataclass
class Examined:
    """What could be read, and what is wrong.

    Attributes:
        headers: Of the shards that could be read, by number.
    """

    index: Index | None = None
    state: StateFile | None = None
    headers: dict[int, ShardHeader] = field(default_factory=dict)
    findings: list[CheckpointProblem] = field(default_factory=list)


def open_checkpoint(folder: Path) -> Contents:
    """Index and state of a checkpoint, held against each other and their digests.

    Raises:
        DamagedError: something is missing, damaged, or of another save; names each file.
    """
    examined = examine_files(folder)
    if examined.findings or examined.index is None or examined.state is None:
        raise DamagedError(f"checkpoint {folder} is not what was saved", examined.findings)
    return Contents(folder, examined.index, examined.state)


def open_shard(contents: Contents, number: int) -> ShardHeader:
    """The header of a shard, held against the index.

    Raises:
        DamagedError: as `read_shard_header`; or it is of another save, or its header is not the one that was indexed.
    """
    header = read_shard_header(contents.folder, number)
    if finding := shard_problem(contents.index, number, header):
        raise DamagedError(f"checkpoint {contents.folder} is not what was saved", [finding])
    return header


def examine(folder: Path) -> Examined:
    """Everything about a checkpoint that needs no tensor, all faults at once."""
    examined = examine_files(folder)
    if examined.index is None:
        return examined
    for number in range(examined.index.num_shards):
        try:
            header = read_shard_header(folder, number)
        except DamagedError as error:
            examined.findings += error.findings
            continue
        if finding := shard_problem(examined.index, number, header):
            examined.findings.append(finding)
        else:
            examined.headers[number] = header
    known = {shard_file(number) for number in range(examined.index.num_shards)}
    for path in sorted(folder.glob("shard_*.safetensors")):
        if path.name not in known:
            examined.findings.append(CheckpointProblem("foreign", path.name, f"{INDEX_FILE} knows no such file"))
    return examined


def examine_files(folder: Path) -> Examined:
    """The JSON files alone."""
    examined = Examined()
    findings = examined.findings
    present = [name for name in (INDEX_FILE, STATE_FILE, SEAL_FILE) if (folder / name).is_file()]
    findings += [
        CheckpointProblem("missing", name, "is not there")
        for name in (INDEX_FILE, STATE_FILE, SEAL_FILE)
        if name not in present
    ]
    try:
        examined.index = read_index(folder) if INDEX_FILE in present else None
    except DataError as error:
        findings.append(CheckpointProblem("damaged", INDEX_FILE, str(error)))
    try:
        examined.state = read_stored(folder / STATE_FILE, StateFile) if STATE_FILE in present else None
    except DataError as error:
        findings.append(CheckpointProblem("damaged", STATE_FILE, str(error)))
    _examine_saves(folder, examined, SEAL_FILE in present)
    named = step_of(folder)
    if examined.index and named is not None and named != examined.index.step:
        detail = f"the checkpoint is of step {examined.index.step}, its folder is named step_{named}"
        findings.append(CheckpointProblem("mixed up", INDEX_FILE, detail))
    return examined


def shard_problem(index: Index, number: int, header: ShardHeader) -> CheckpointProblem | None:
    """What is wrong with a shard whose header could be read."""
    name = shard_file(number)
    if header.save_id != index.save_id:
        known = all(
            part in index.tensors and index.tensors[part].dtype == dtype for part, (dtype, _) in header.parts.items()
        )
        whose = f"of save {header.save_id} at step {header.step}, the checkpoint is of {index.save_id} at step {index.step}"
        return (
            CheckpointProblem("mixed up", name, whose)
            if known
            else CheckpointProblem("foreign", name, f"{whose}; it is of another model")
        )
    entry = index.shards[number]
    if header.sha256 != entry.header_sha256 or header.size != entry.size:
        return CheckpointProblem(
            "damaged", name, "its header is not the one that was saved; perhaps it is another rank's file"
        )
    missing = [part for part, (dtype, chunk) in header.parts.items() if not _indexed(index, part, dtype, chunk)]
    if missing:
        return CheckpointProblem("damaged", name, f"holds a part that {INDEX_FILE} does not name", missing[0])
    return None


def _indexed(index: Index, name: str, dtype: str, chunk: object) -> bool:
    entry = index.tensors.get(name)
    return entry is not None and entry.dtype == dtype and chunk in entry.chunks


def _examine_saves(folder: Path, examined: Examined, sealed: bool) -> None:
    """Whether the files are of one save, and what the digests say."""
    findings = examined.findings
    try:
        seal = read_seal(folder) if sealed else None
    except OSError as error:
        findings.append(CheckpointProblem("damaged", SEAL_FILE, f"cannot be read: {error.strerror or error}"))
        return
    if sealed and seal is None:
        findings.append(CheckpointProblem("damaged", SEAL_FILE, "is not of the form that was saved"))
    ids = {INDEX_FILE: examined.index and examined.index.save_id, STATE_FILE: examined.state and examined.state.save_id}
    ids[SEAL_FILE] = seal and seal[0]
    said = {name: save_id for name, save_id in ids.items() if save_id}
    if len(set(said.values())) > 1:
        common, count = Counter(said.values()).most_common(1)[0]
        odd = {name for name, save_id in said.items() if save_id != common} if count > 1 else set(said)
        text = ", ".join(f"{name} of save {save_id}" for name, save_id in said.items())
        findings += [CheckpointProblem("mixed up", name, f"of another save than the rest: {text}") for name in sorted(odd)]
        return
    if examined.index and examined.state and examined.index.step != examined.state.step:
        steps = f"is of step {examined.index.step}, {STATE_FILE} of step {examined.state.step}"
        findings.append(CheckpointProblem("damaged", INDEX_FILE, steps))
    faulty = {finding.file for finding in findings}
    for name, digest in (seal[1] if seal else {}).items():
        if name not in faulty and (folder / name).is_file() and digest_of(folder / name) != digest:
            findings.append(
                CheckpointProblem("damaged", name, f"is not what was saved: its digest is not the one in {SEAL_FILE}")
            )
