"""Reads the rows of WebDataset's tar shards. The files of a sample share their name up to the first dot."""

import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from moe_dist.config.json_text import parse_json
from moe_dist.errors import DataError

_MOST_ROW = 1 << 26  # largest number of bytes of a sample's .json
_MOST_HEADER = 1 << 20  # largest number of bytes of an extended header, which tarfile reads whole
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
SizedRow = tuple[str, dict[str, Any], int]  # place for error texts, row, the row's number of characters with its nulls


class ShardRow(dict[str, Any]):
    """A row of a shard. `__shard__` is the shard's name; `__members__` maps the names of the sample's other files to [first
    byte, number of bytes]."""


def shard_files(path: Path) -> list[Path]:
    """Returns the tar shards at a path: the file itself, or the tar files of the folder."""
    files = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    return [file for file in files if file.suffix == ".tar" and file.is_file()]


def shard_rows(shards: Sequence[Path]) -> Iterator[SizedRow]:
    """Yields a row for each sample. Reads no pictures. Call it in a child process with limits of time and memory.

    Raises:
        DataError: a shard is cut short, compressed or not a tar file, or a sample has no .json with an object.
    """
    for shard in shards:
        try:
            with tarfile.open(shard, "r:", tarinfo=_Header) as tar:
                for key, sample in groupby(_files(tar, shard.stat().st_size), key=lambda each: _key(each.name)):
                    row = _row(shard, tar, key, list(sample))
                    yield f"{shard}, sample {key}", row, len(repr(row))
            _check_end(shard)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise DataError(f"{shard}: no whole uncompressed tar file ({error}); copy it again") from error


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        found = super().frombuf(buf, encoding, errors)
        if found.type in _EXTENDED and found.size > _MOST_HEADER:
            raise tarfile.ReadError(f"an extended header has {found.size:,} bytes, and at most {_MOST_HEADER:,} are read")
        return found


def _files(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files. Raises tarfile.ReadError if a header points backwards or beyond the end of the shard."""
    last = -1
    for each in tar:
        if each.offset <= last or (each.isreg() and not 0 <= each.size <= size - each.offset_data):
            raise tarfile.ReadError(f"{each.name!r:.200} at byte {each.offset:,} does not fit into it")
        last = each.offset
        if each.isreg():
            yield each


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _row(shard: Path, tar: tarfile.TarFile, key: str, sample: list[tarfile.TarInfo]) -> ShardRow:
    rows = [each for each in sample if each.name == f"{key}.json"]
    stream = tar.extractfile(rows[0]) if len(rows) == 1 and rows[0].size <= _MOST_ROW else None
    try:
        row = parse_json(stream.read()) if stream is not None else None
    except ValueError as error:
        raise DataError(f"{shard}, sample {key}: its .json is no JSON ({error}); correct it") from error
    if not isinstance(row, dict):
        raise DataError(f"{shard}, sample {key}: needs one .json with an object of at most {_MOST_ROW:,} bytes")
    parts = {each.name: [each.offset_data, each.size] for each in sample if each is not rows[0]}
    return ShardRow({**row, "__shard__": shard.name, "__members__": parts})


def _check_end(shard: Path) -> None:
    """Raises EOFError if the two final blocks of zeros are missing. tarfile does not notice a shard cut between files."""
    with shard.open("rb") as stream:
        stream.seek(max(0, shard.stat().st_size - 1024))
        if stream.read().strip(b"\0") or shard.stat().st_size < 1024:
            raise EOFError("its end is missing")
