"""What can be known of a Megatron .bin/.idx pair without torch or Megatron: counts, sizes, and faults.

Layout of an .idx (little endian): magic, uint64 version 1, uint8 dtype code, uint64 number of sequences, uint64 number of
document marks (documents + 1); then int32 lengths and int64 byte offsets of the sequences, int64 document marks, and one
int8 a sequence if the set was written as multimodal. The .bin holds the tokens and nothing else.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_dist.config.manifest import SplitSection
from moe_dist.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_FIXED = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 22  # tokens looked at at once: 32 MiB of int64


@dataclass(frozen=True)
class IndexHeader:
    """One .bin/.idx pair.

    Attributes:
        documents: Documents in the index.
        sequences: Sequences in the index; a document is a run of one or more.
        tokens: Tokens in the .bin.
        dtype: Type of a token.
        bin_bytes: Size of the .bin.
    """

    documents: int
    sequences: int
    tokens: int
    dtype: np.dtype
    bin_bytes: int


def read_index_header(prefix: str | Path) -> IndexHeader:
    """Reads <prefix>.idx and holds its counts against the sizes of both files. Costs a few small reads.

    Raises:
        DataError: one of the files is missing, truncated, or not of this format.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [str(path) for path in (idx, data) if not path.is_file()]
    if missing:
        raise DataError(f"missing {' and '.join(missing)}: a data set is a pair of .bin and .idx; see docs/data.md")
    with idx.open("rb") as stream:
        fixed = stream.read(_FIXED.size)
        if len(fixed) < _FIXED.size or not fixed.startswith(MAGIC):
            raise DataError(f"{idx}: not a Megatron index (it does not begin with {MAGIC!r}); build it again")
        _, version, code, sequences, marks = _FIXED.unpack(fixed)
        if version != 1 or code not in _DTYPES:
            raise DataError(f"{idx}: version {version} and dtype code {code}; known: version 1, codes {sorted(_DTYPES)}")
        _check_size(idx, _FIXED.size + sequences * 12 + marks * 8, optional=sequences)
        if not sequences or marks < 2:
            raise DataError(f"{idx}: holds no document")
        stream.seek(_FIXED.size + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(_FIXED.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
        stream.seek(_FIXED.size + 12 * sequences + 8 * (marks - 1))
        (last_mark,) = struct.unpack("<q", stream.read(8))
    if last_mark != sequences:
        raise DataError(f"{idx}: the last document ends at sequence {last_mark}, but there are {sequences}; build it again")
    dtype = np.dtype(_DTYPES[code])
    bin_bytes = last_offset + last_length * dtype.itemsize
    _check_size(data, bin_bytes)
    return IndexHeader(marks - 1, sequences, bin_bytes // dtype.itemsize, dtype, bin_bytes)


def check_split(folder: str | Path, split: SplitSection) -> IndexHeader:
    """Holds a split of a manifest against its files, its filler bits too.

    Raises:
        DataError: a file is missing or damaged, or the manifest has other counts than the index.
    """
    prefix = Path(folder) / split.path
    header = read_index_header(prefix)
    for what, said, found in (("documents", split.documents, header.documents), ("tokens", split.tokens, header.tokens)):
        if said != found:
            raise DataError(
                f"{prefix}.idx has {found} {what}, but the manifest says {said}; mend the manifest, or the files"
            )
    if split.filler is not None:
        path = Path(folder) / split.filler
        try:
            bits = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"filler {str(path)!r} cannot be read: {error}") from error
        if bits.dtype != np.uint8 or bits.shape != (-(-header.tokens // 8),):
            raise DataError(
                f"filler {str(path)!r} is {bits.dtype} {list(bits.shape)}; {header.tokens} tokens need "
                f"uint8 [{-(-header.tokens // 8)}], one bit a token as numpy.packbits writes them"
            )
    return header


def largest_id(prefix: str | Path) -> int:
    """Largest token id in <prefix>.bin; reads the whole file once, in chunks, at the speed of the disk.

    Raises:
        DataError: as `read_index_header`, or an id is negative.
    """
    largest = 0
    for chunk in _chunks(prefix):
        if chunk.min() < 0:
            raise DataError(f"{prefix}.bin: holds the negative id {chunk.min()}; token ids begin at 0")
        largest = max(largest, int(chunk.max()))
    return largest


def count_by_modality(prefix: str | Path, modalities: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, int]:
    """Tokens of each modality in <prefix>.bin, by the id ranges of a manifest; reads the whole file once.

    Raises:
        DataError: as `read_index_header`.
    """
    counts = dict.fromkeys(modalities, 0)
    for chunk in _chunks(prefix):
        for name, ranges in modalities.items():
            counts[name] += sum(int(((chunk >= first) & (chunk < end)).sum()) for first, end in ranges)
    return counts


def _chunks(prefix: str | Path) -> Iterator[np.ndarray]:
    header = read_index_header(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=header.dtype, mode="r")
    for at in range(0, header.tokens, _CHUNK):
        yield tokens[at : at + _CHUNK]


def _check_size(path: Path, expected: int, *, optional: int = 0) -> None:
    """`optional`: bytes that may follow the expected ones."""
    found = path.stat().st_size
    if found not in (expected, expected + optional):
        how = "truncated" if found < expected else "longer than its index says"
        raise DataError(f"{path}: {how}: {found} bytes, expected {expected}; copy or build it again")
