"""Encodes pictures by a codebook. A picture is a grid of patches, and a patch's code is the index of the nearest entry.

Because patches and entries are uint8, every distance is an integer below 2^24, which float32 represents exactly. The codes
of a picture therefore do not depend on the machine, its BLAS or the number of threads.

Shape letters: N pictures, P patches, K codebook entries, V values per patch (patch * patch * 3).
"""

from pathlib import Path

import numpy as np

from moe_dist.errors import DataError
from moe_dist.formats.numpy_file import load_array

GRID = 8  # number of patches along each side of a picture, which thus has 64 codes
PATCH = 4  # number of pixels along each side of a patch
SIDE = GRID * PATCH
_MOST_BYTES = 1 << 22  # largest size of a codebook's file; 2^16 codes have 3 MiB
_CHUNK = 8192  # number of patches that are compared at once; for 512 entries they have 16 MiB of distances


def to_patches(pictures: np.ndarray) -> np.ndarray:
    """Cuts pictures, uint8 [N, SIDE, SIDE, 3], into patches, uint8 [N * GRID * GRID, V], row by row of each picture."""
    cut = pictures.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(cut.reshape(-1, PATCH * PATCH * 3))


def encode(patches_PV: np.ndarray, codebook_KV: np.ndarray) -> np.ndarray:
    """Returns for each patch the index of the nearest codebook entry, uint16 [P]. If several entries are equally near,
    takes the lowest index. The codebook is uint8, [K, V] or [K, PATCH, PATCH, 3]."""
    entries_KV = codebook_KV.reshape(len(codebook_KV), -1).astype(np.float32)
    squares_K = (entries_KV**2).sum(1)
    codes = [
        (squares_K - 2 * (patches_PV[at : at + _CHUNK].astype(np.float32) @ entries_KV.T)).argmin(1)
        for at in range(0, len(patches_PV), _CHUNK)
    ]
    return np.concatenate(codes).astype(np.uint16) if codes else np.empty(0, np.uint16)


def decode(codes: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Makes pictures, uint8 [N, SIDE, SIDE, 3], from codes, integer [N, GRID * GRID]."""
    patches = codebook.reshape(len(codebook), PATCH, PATCH, 3)[codes.reshape(-1, GRID, GRID).astype(np.int64)]
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, 3)


def fit(patches_PV: np.ndarray, *, codes: int, seed: int, rounds: int = 12) -> np.ndarray:
    """Fits a codebook of K = `codes` entries by k-means from random distinct patches. Entries are rounded to uint8 after
    each round.

    Returns:
        uint8 [K, PATCH, PATCH, 3].

    Raises:
        DataError: there are fewer distinct patches than entries.
    """
    distinct_PV, counts_P = np.unique(patches_PV, axis=0, return_counts=True)
    if len(distinct_PV) < codes:
        most = len(distinct_PV)
        raise DataError(f"--codes {codes}: the pictures have only {most} distinct patches; give --codes {most} or less")
    rng = np.random.default_rng(seed)
    entries_KV = distinct_PV[rng.choice(len(distinct_PV), codes, replace=False)]
    # Each distinct patch is weighted by its number of occurrences. Very frequent patches, such as plain backgrounds,
    # therefore usually become entries.
    weighted_VP = np.ascontiguousarray(distinct_PV.T) * counts_P
    for _ in range(rounds):
        nearest_P = encode(distinct_PV, entries_KV)
        weight_K = np.bincount(nearest_P, weights=counts_P, minlength=codes)
        # bincount's float64 sums are exact, because they are integers below 2^53.
        sums_VK = np.stack([np.bincount(nearest_P, weights=values_P, minlength=codes) for values_P in weighted_VP])
        entries_KV = np.rint(sums_VK / np.maximum(weight_K, 1)).T.astype(np.uint8)
        unused = np.flatnonzero(weight_K == 0)
        entries_KV[unused] = distinct_PV[rng.choice(len(distinct_PV), len(unused), replace=False)]
    return entries_KV.reshape(codes, PATCH, PATCH, 3)


def load_codebook(path: str | Path) -> np.ndarray:
    """Reads a codebook, uint8 [K, PATCH, PATCH, 3]. Raises DataError if the file is missing, is not a .npy file, or has
    another shape."""
    try:
        codebook = load_array(Path(path), most_bytes=_MOST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"codebook {str(path)!r} cannot be read: {error}") from error
    if codebook.dtype != np.uint8 or codebook.ndim != 4 or codebook.shape[1:] != (PATCH, PATCH, 3) or not len(codebook):
        raise DataError(
            f"codebook {str(path)!r} is {codebook.dtype} {list(codebook.shape)}, not uint8 [codes, {PATCH}, {PATCH}, 3]"
        )
    return codebook
