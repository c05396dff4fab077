"""Checks the files of one split against their manifest. Without torch or Megatron."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from moe_dist.config.index_header import IndexHeader, index_paths, read_index_header
from moe_dist.config.manifest import SplitSection
from moe_dist.errors import DataError

Bits = Literal["filler", "prompt"]  # keys of a split that name a file of bits
BITS: tuple[Bits, ...] = ("filler", "prompt")
_CHUNK = 1 << 22  # tokens in a chunk: 32 MiB of int64


def check_split(folder: str | Path, split: SplitSection) -> IndexHeader:
    """Checks a split of a manifest against its .bin, .idx and bits. Reads the list of lengths, no tokens.

    Raises:
        DataError: a file is missing or damaged, or its counts differ from the manifest's.
    """
    prefix = Path(folder) / split.path
    header = read_index_header(prefix)
    for what, said, found in (("documents", split.documents, header.documents), ("tokens", split.tokens, header.tokens)):
        if said != found:
            raise DataError(f"{prefix}.idx has {found} {what}, but its manifest says {said}; mend that, or the files")
    for bits in BITS:
        load_bits(folder, split, bits)
    return header


def load_bits(folder: str | Path, split: SplitSection, bits: Bits) -> np.ndarray | None:
    """Bits of a split, memory-mapped, eight tokens in a byte as by numpy.packbits: an .npy file, or raw bytes.

    Returns:
        uint8 [ceil(tokens / 8)], or None if the split has none.

    Raises:
        DataError: the file is missing, damaged, or of another length.
    """
    file: str | None = getattr(split, bits)
    if file is None:
        return None
    path, expected = Path(folder) / file, -(-split.tokens // 8)
    try:
        found = (
            np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else np.memmap(path, np.uint8, "r")
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{bits} {str(path)!r} cannot be read: {error}") from error
    if found.dtype != np.uint8 or found.shape != (expected,):
        raise DataError(
            f"{bits} {str(path)!r} is {found.dtype} {list(found.shape)}; {split.tokens} tokens need uint8 [{expected}], "
            "one bit a token as numpy.packbits writes them"
        )
    return found


def count_by_modality(prefix: str | Path, modalities: Mapping[str, Sequence[tuple[int, int]]]) -> dict[str, int]:
    """Tokens of each modality in <prefix>.bin, by the id ranges of a manifest. Reads the whole file, in chunks.

    Raises:
        DataError: the files are missing or damaged.
    """
    header = read_index_header(Path(prefix))
    tokens = np.memmap(index_paths(Path(prefix))[1], np.dtype(header.dtype), "r")
    counts = dict.fromkeys(modalities, 0)
    for at in range(0, header.tokens, _CHUNK):
        chunk = tokens[at : at + _CHUNK]
        for name, ranges in modalities.items():
            counts[name] += sum(int(((chunk >= first) & (chunk < end)).sum()) for first, end in ranges)
    return counts
