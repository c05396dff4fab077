"""Pictures are encoded with exact arithmetic, and a fitted codebook restores the patches from which it was fitted."""

from pathlib import Path

import numpy as np

from moe_dist.data.codebook import SIDE, decode, encode, fit, load_codebook, to_patches
from moe_dist.errors import DataError
from tests.support.messages import refused


def test_encode_is_the_nearest_entry_in_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    patches, codebook = rng.integers(0, 256, (9000, 48), np.uint8), rng.integers(0, 256, (31, 4, 4, 3), np.uint8)
    entries = codebook.reshape(31, 48).astype(np.int64)
    chosen = np.r_[0:50, 8990:9000]  # includes both sides of a chunk's border
    expected = [((patch.astype(np.int64) - entries) ** 2).sum(1).argmin() for patch in patches[chosen]]
    assert encode(patches, codebook)[chosen].tolist() == expected


def test_decode_undoes_encode_where_every_patch_is_an_entry() -> None:
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    codebook = np.unique(to_patches(pictures), axis=0)
    codes = encode(to_patches(pictures), codebook).reshape(3, 64)
    np.testing.assert_array_equal(decode(codes, codebook), pictures)


def test_fit_finds_clusters_and_gives_flat_colours_their_own_entry() -> None:
    rng = np.random.default_rng(2)
    centres = rng.integers(20, 230, (20, 48))
    noisy = (centres[rng.integers(0, 20, 4000)] + rng.integers(-3, 4, (4000, 48))).astype(np.uint8)
    flat = np.full((3000, 48), 255, np.uint8)
    codebook = fit(np.concatenate([noisy, flat]), codes=40, seed=0)
    assert codebook.shape == (40, 4, 4, 3)
    np.testing.assert_array_equal(codebook, fit(np.concatenate([noisy, flat]), codes=40, seed=0))
    restored = codebook.reshape(40, 48)[encode(flat, codebook)]
    np.testing.assert_array_equal(restored, flat)
    error = codebook.reshape(40, 48)[encode(noisy, codebook)].astype(int) - noisy
    assert (error**2).mean() < 16  # the noise has variance 4; the squared distance to a wrong cluster is in the hundreds


def test_fit_refuses_more_codes_than_patches() -> None:
    with refused(DataError, "--codes 5"):
        fit(np.zeros((100, 48), np.uint8), codes=5, seed=0)


def test_load_refuses_what_is_no_codebook(tmp_path: Path) -> None:
    with refused(DataError):
        load_codebook(tmp_path / "missing.npy")
    np.save(tmp_path / "wrong.npy", np.zeros((4, 48), np.uint8))
    with refused(DataError):
        load_codebook(tmp_path / "wrong.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with refused(DataError):
        load_codebook(tmp_path / "object.npy")
