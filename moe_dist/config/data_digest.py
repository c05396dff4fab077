"""Digests of a run's data, over manifest and files, so that other data under the same path are noticed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_dist.config.index_header import index_paths
from moe_dist.config.manifest import MANIFEST_FILE, Manifest
from moe_dist.errors import DataError

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # sampled from a .bin: 4 MiB, evenly spaced; smaller files are read whole


def data_digest(folder: str | Path, manifest: Manifest) -> dict[str, str]:
    """Size and SHA-256, by file name: of the manifest, of each training .idx, and of blocks of each training .bin and its
    prompt bits.

    Reads the indices whole (about a second for 1 GB) and 4 MiB of each .bin. Changed tokens in a few blocks of a large .bin
    may go unnoticed if all lengths are the same.

    Raises:
        DataError: a file cannot be read.
    """
    folder = Path(folder)
    try:
        digests = {MANIFEST_FILE: _whole(folder / MANIFEST_FILE)}
        for source in manifest.sources.values():
            idx, bin_ = index_paths(folder / source.train.path)
            digests |= {f"{source.train.path}.idx": _whole(idx), f"{source.train.path}.bin": sampled_digest(bin_)}
            if source.train.prompt is not None:
                digests[source.train.prompt] = sampled_digest(folder / source.train.prompt)
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be read: {error.strerror or error}", see="docs/data.md"
        ) from error
    return digests


def digest_problems(saved: Mapping[str, object], found: Mapping[str, str]) -> list[str]:
    """One line for each file that has changed."""
    return [
        f"{name}: {saved.get(name, 'was not there')} when the checkpoint was written, {found.get(name, 'is not there')} now"
        for name in dict.fromkeys([*saved, *found])
        if saved.get(name) != found.get(name)
    ]


def _whole(path: Path) -> str:
    with path.open("rb") as stream:
        return f"{path.stat().st_size} bytes, sha256 {hashlib.file_digest(stream, 'sha256').hexdigest()[:32]}"


def sampled_digest(path: Path) -> str:
    """Size and SHA-256 of a file; of a larger file, of 4 MiB evenly spaced. Raises: OSError."""
    size = path.stat().st_size
    if size <= _BLOCKS * _BLOCK_BYTES:
        return _whole(path)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for start in np.linspace(0, size - _BLOCK_BYTES, _BLOCKS).astype(np.int64).tolist():
            stream.seek(start)
            digest.update(stream.read(_BLOCK_BYTES))
    return f"{size} bytes, sha256 of {_BLOCKS} blocks {digest.hexdigest()[:32]}"
