"""Reads arrays that numpy saved, without running what they contain."""

import tokenize
from pathlib import Path

import numpy as np

from moe_dist.config.regular_file import open_regular

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (EOFError, MemoryError, OverflowError, RecursionError, SyntaxError, TypeError, tokenize.TokenError)
_MAGIC = b"\x93NUMPY"  # begins a .npy file; np.load would also open zip files and pickles


def load_array(path: Path, *, most_bytes: int | None = None) -> np.ndarray:
    """Memory-maps a .npy file, or reads it whole if it has at most `most_bytes` bytes. Raises OSError if it cannot be read,
    and ValueError if it is no .npy file, is damaged, contains objects or is too large."""
    with open_regular(path) as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no .npy file")
        size = stream.seek(0, 2)
        stream.seek(0)
        try:
            version = np.lib.format.read_magic(stream)
            shape, _, dtype = _HEADERS[version](stream)
        except (*_DAMAGE, KeyError, ValueError) as error:
            raise ValueError(f"its header is damaged: {error!r:.100}") from error
        if not dtype.itemsize or min(shape, default=0) < 0:  # numpy would divide by zero
            raise ValueError(f"its header is damaged: {dtype} of shape {shape}")
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"{size:,} bytes; at most {most_bytes:,} are possible")
    try:
        return np.load(path, mmap_mode="r" if most_bytes is None else None, allow_pickle=False)
    except _DAMAGE as error:
        raise ValueError(f"its header is damaged: {error!r:.100}") from error
