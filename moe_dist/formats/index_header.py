"""Reads headers of Megatron's indexed data sets (<prefix>.idx and <prefix>.bin), and writes .idx, without torch and
Megatron.

megatron-core's `IndexedDatasetBuilder` writes an .idx in little endian, with these parts: 9 bytes magic; u64 version; u8
type code; u64 S, number of sequences; u64 D, length of the document list (number of documents + 1); int32 [S] number of
tokens of each sequence; int64 [S] byte offset of each sequence in .bin; int64 [D] document list, the index of each
document's first sequence, then S; in multimodal sets also int8 [S] modes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_dist.errors import DataError, StorageError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class IndexHeader:
    """The sizes of one data set split, which is a pair of files .idx and .bin."""

    documents: int  # number of documents; a document is a block of consecutive sequences
    sequences: int  # equal to `documents` if each document is one sequence
    tokens: int  # number of tokens in all sequences
    dtype: str  # numpy's name of the token ids' type
    itemsize: int  # number of bytes per token id
    bin_bytes: int  # size of .bin, which is tokens x itemsize


def index_paths(prefix: Path) -> tuple[Path, Path]:
    """Returns the paths <prefix>.idx and <prefix>.bin. Keeps dots in the prefix."""
    return prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")


def list_offsets(sequences: int) -> tuple[int, int, int]:
    """Returns the byte offsets of an .idx file's three lists: numbers of tokens, byte offsets in .bin, document list."""
    return _HEADER.size, _HEADER.size + sequences * 4, _HEADER.size + sequences * 12


def write_index(idx: Path, dtype: np.dtype, lengths_S: np.ndarray) -> None:
    """Writes an .idx in which each document is one sequence. `lengths_S` has their numbers of tokens, int32 [S]."""
    code = next(code for code, name in _DTYPES.items() if name == dtype.name)
    sequences, ends_S = len(lengths_S), np.cumsum(lengths_S, dtype=np.int64)
    with idx.open("wb") as stream:
        stream.write(_HEADER.pack(MAGIC, 1, code, sequences, sequences + 1))
        stream.write(lengths_S.tobytes())
        stream.write(((ends_S - lengths_S) * dtype.itemsize).tobytes())
        stream.write(np.arange(sequences + 1, dtype=np.int64).tobytes())


def read_index_header(prefix: Path) -> IndexHeader:
    """Reads the header and all sequence lengths of <prefix>.idx. Compares the lengths' sum with the size of <prefix>.bin.

    Raises:
        DataError: a file is missing, truncated or of another format, or .idx and .bin do not match.
        StorageError: the file system does not respond.
    """
    idx, bin_ = index_paths(prefix)
    for path in (idx, bin_):
        if not path.is_file():
            raise DataError(f"{path}: missing; prepare the data again, or correct the path in the manifest (docs/data.md)")
    code, sequences, entries = _read_fixed_part(idx)
    dtype = np.dtype(_DTYPES[code])
    at_lengths, _, at_starts = list_offsets(sequences)
    lists = at_starts + entries * 8
    size = idx.stat().st_size
    if size not in (lists, lists + sequences):  # multimodal sets append one mode byte per sequence
        raise DataError(f"{idx}: {size} bytes, but its header says {lists}: cut short or damaged; copy or prepare it again")
    if sequences == 0 or entries < 2:
        raise DataError(f"{idx}: holds no documents")
    lengths = np.memmap(idx, np.int32, "r", at_lengths, (sequences,))
    starts = np.memmap(idx, np.int64, "r", at_starts, (entries,))
    tokens = int(lengths.sum(dtype=np.int64))
    if int(lengths.min()) < 0 or int(starts[0]) != 0 or int(starts[-1]) != sequences:
        raise DataError(f"{idx}: its lists contradict each other: damaged; copy or prepare it again")
    bin_bytes = bin_.stat().st_size
    if bin_bytes != tokens * dtype.itemsize:
        raise DataError(
            f"{bin_}: {bin_bytes} bytes, but its .idx says {tokens} tokens of {dtype.itemsize} bytes = "
            f"{tokens * dtype.itemsize}: cut short, or of another .idx; copy or prepare both again"
        )
    return IndexHeader(entries - 1, sequences, tokens, dtype.name, dtype.itemsize, bin_bytes)


def largest_id(prefix: Path, *, max_bytes: int = 1 << 30) -> int:
    """Returns the largest token id in <prefix>.bin. Reads the whole file if it has at most `max_bytes` bytes, which takes
    about a second per GiB from the page cache. Of a larger file, reads evenly spaced blocks, in total `max_bytes`.

    Raises:
        DataError: as in `read_index_header`; or the ids are not integers; or an id is negative.
    """
    header = read_index_header(prefix)
    _, bin_ = index_paths(prefix)
    dtype = np.dtype(header.dtype)
    if dtype.kind not in "iu":
        raise DataError(f"{bin_}: holds {header.dtype}, token ids must be integers")
    if header.tokens == 0:
        raise DataError(f"{bin_}: holds no tokens")
    ids = np.memmap(bin_, dtype, "r")
    block = _BLOCK_BYTES // dtype.itemsize
    blocks = -(-header.tokens // block)
    wanted = min(blocks, max(1, max_bytes // _BLOCK_BYTES))
    largest = smallest = 0
    for index in np.linspace(0, blocks - 1, wanted).astype(np.int64):
        part = ids[index * block : (index + 1) * block]
        largest, smallest = max(largest, int(part.max())), min(smallest, int(part.min()))
    if smallest < 0:
        raise DataError(f"{bin_}: holds the negative id {smallest}; ids must be 0 or more")
    return largest


def _read_fixed_part(idx: Path) -> tuple[int, int, int]:
    """Returns the type code, the number of sequences, and the length of the document list."""
    try:
        with idx.open("rb") as stream:
            raw = stream.read(_HEADER.size)
    except OSError as error:
        raise StorageError(
            f"{idx}: cannot be read: {error.strerror or error}; look at the disk or file system that holds it",
            see="docs/reliability.md",
        ) from error
    if raw[: len(MAGIC)] != MAGIC[: len(raw)]:
        raise DataError(f"{idx}: not a Megatron index (it must begin with {MAGIC!r})")
    if len(raw) < _HEADER.size:
        raise DataError(f"{idx}: {len(raw)} bytes, cut short inside its header; copy or prepare it again")
    _, version, code, sequences, entries = _HEADER.unpack(raw)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{idx}: version {version} and type code {code}; known are version 1 and codes 1 to {len(_DTYPES)}")
    return code, sequences, entries
