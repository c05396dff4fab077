"""Compares the files of a data set with its manifest, and with the digests in a checkpoint. Needs no torch."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moe_dist.config.regular_file import open_regular
from moe_dist.errors import DataError
from moe_dist.formats.index_header import IndexHeader, index_paths, read_index_header
from moe_dist.formats.manifest import MANIFEST_FILE, Manifest, SplitSection
from moe_dist.formats.numpy_file import load_array

Bits = Literal["filler", "prompt"]  # keys of a split that name a file with one bit per token
BITS: tuple[Bits, ...] = ("filler", "prompt")
PREPROCESSOR = "preprocessor_config.json"  # transformers' file of an image processor
_CHUNK = 1 << 22  # number of tokens in a chunk (32 MiB of int64)
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # a large file's digest covers evenly spaced blocks, in total 4 MiB


def check_split(folder: str | Path, split: SplitSection) -> IndexHeader:
    """Compares a manifest's split with the split's .idx, .bin, filler and prompt files. Reads the sequences' lengths but no
    tokens. Raises DataError if a file is missing or damaged, or its counts differ from those in the manifest."""
    prefix = Path(folder) / split.path
    header = read_index_header(prefix)
    for what, said, found in (("documents", split.documents, header.documents), ("tokens", split.tokens, header.tokens)):
        if said != found:
            raise DataError(f"{prefix}.idx has {found} {what}, but its manifest says {said}; correct that, or the files")
    for bits in BITS:
        load_bits(folder, split, bits)
    return header


def load_bits(folder: str | Path, split: SplitSection, bits: Bits) -> np.ndarray | None:
    """Memory-maps a file with one bit per token of a split (numpy.packbits). In the file `filler`, 1 marks a picture cell
    that shows only background. In the file `prompt`, 1 marks a token of a prompt.

    Returns:
        uint8 [ceil(tokens / 8)], or None if the split has no such file.

    Raises:
        DataError: the file is missing, damaged, or of another length.
    """
    file: str | None = getattr(split, bits)
    if file is None:
        return None
    path, expected = Path(folder) / file, -(-split.tokens // 8)
    try:
        open_regular(path).close()  # rejects a FIFO, on which numpy would wait for a writer
        found = load_array(path) if path.suffix == ".npy" else np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{bits} {str(path)!r} cannot be read: {error}") from error
    if found.dtype != np.uint8 or found.shape != (expected,):
        raise DataError(
            f"{bits} {str(path)!r} is {found.dtype} {list(found.shape)}; {split.tokens} tokens need uint8 [{expected}], "
            "one bit per token as numpy.packbits writes them"
        )
    return found


def count_by_modality(prefix: str | Path, modalities: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, int]:
    """Counts the tokens of each modality in <prefix>.bin by a manifest's id ranges. Reads the whole file, in chunks. Raises
    DataError if the files are missing or damaged."""
    header = read_index_header(Path(prefix))
    tokens = np.memmap(index_paths(Path(prefix))[1], np.dtype(header.dtype), "r")
    counts = dict.fromkeys(modalities, 0)
    for at in range(0, header.tokens, _CHUNK):
        chunk = tokens[at : at + _CHUNK]
        for name, ranges in modalities.items():
            counts[name] += sum(int(((chunk >= first) & (chunk < end)).sum()) for first, end in ranges)
    return counts


def tokens_by_modality(folder: str | Path, split: SplitSection, manifest: Manifest) -> dict[str, int]:
    """Returns the number of tokens of each modality in a split. Takes these numbers from the manifest or, if it has none,
    counts the tokens in the .bin."""
    counts = split.tokens_by_modality
    if not counts and len(manifest.modalities) == 1:
        counts = dict.fromkeys(manifest.modalities, split.tokens)
    counts = counts or count_by_modality(Path(folder) / split.path, manifest.modalities)
    return {modality: counts.get(modality, 0) for modality in manifest.modalities}


def data_digest(folder: str | Path, manifest: Manifest) -> dict[str, str]:
    """Maps file names to size and SHA-256, for the manifest and for each training split's .idx, .bin and prompt file. Reads
    all of an .idx (about a second per GB), but at most 4 MiB of any other file. If some tokens in a larger .bin change but
    no sequence length, the digests may therefore stay the same.

    Raises:
        DataError: a file cannot be read.
    """
    folder = Path(folder)
    try:
        digests = {MANIFEST_FILE: _whole_digest(folder / MANIFEST_FILE)}
        for source in manifest.sources.values():
            idx, bin_ = index_paths(folder / source.train.path)
            digests |= {f"{source.train.path}.idx": _whole_digest(idx), f"{source.train.path}.bin": sampled_digest(bin_)}
            if source.train.prompt is not None:
                digests[source.train.prompt] = sampled_digest(folder / source.train.prompt)
            if source.train.pictures is not None:
                files = (f"{source.train.pictures}.jsonl", f"{source.train.pictures}.npy", PREPROCESSOR)
                digests |= {file: sampled_digest(folder / file) for file in files}
    except OSError as error:
        problem = f"{error.filename or folder}: cannot be read: {error.strerror or error}"
        raise DataError(problem, see="docs/data.md") from error
    return digests


def digest_problems(saved: Mapping[str, object], found: Mapping[str, str]) -> list[str]:
    """Returns one error text for each file whose digest has changed."""
    return [
        f"{name}: {saved.get(name, 'was not there')} when the checkpoint was written, {found.get(name, 'is not there')} now"
        for name in dict.fromkeys([*saved, *found])
        if saved.get(name) != found.get(name)
    ]


def sampled_digest(path: Path) -> str:
    """Returns size and SHA-256 of a file. If the file is larger than 4 MiB, the SHA-256 covers 4 MiB in evenly spaced
    blocks. Raises OSError if the file cannot be read."""
    size = path.stat().st_size
    if size <= _BLOCKS * _BLOCK_BYTES:
        return _whole_digest(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for start in np.linspace(0, size - _BLOCK_BYTES, _BLOCKS).astype(np.int64).tolist():
            stream.seek(start)
            digest.update(stream.read(_BLOCK_BYTES))
    return f"{size} bytes, sha256 of {_BLOCKS} blocks {digest.hexdigest()[:32]}"


def _whole_digest(path: Path) -> str:
    with open_regular(path) as stream:
        return f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}"
