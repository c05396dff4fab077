"""In the default corpus, training and held-out documents share no variant of a picture, and the manifest's counts are
right."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.codebook import encode, load_codebook, to_patches
from moe_dist.data.corpus_packages import python_library
from moe_dist.data.families import near_pairs
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.pictures import augmented, plain, rasterise
from moe_dist.data.tokenizer import SPECIALS, load_tokenizer
from moe_dist.formats.manifest import SplitSection

pytestmark = [pytest.mark.slow, pytest.mark.full]  # preparing the whole default data takes 45 s
Side = list[tuple[int, np.ndarray, np.ndarray]]


def documents(folder: Path, split: SplitSection | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    data = IndexedSplit(folder, split)
    for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
        yield data.tokens(start, length), data.filler(start, length)


@pytest.fixture(scope="module")
def sides(prepared) -> dict[str, Side]:
    """Returns each split's documents in file order as (picture number, tokens, filler).

    A caption may fit several pictures, but a picture's two captions together identify it. A picture's renders are
    consecutive.
    """
    tokenizer = load_tokenizer(prepared.folder / "tokenizer.json")
    number_of = {picture.captions[:2]: number for number, picture in enumerate(prepared.pictures.items)}
    found: dict[str, Side] = {}
    for side in ("train", "valid"):
        docs = list(documents(prepared.folder, getattr(prepared.manifest.sources["openmoji"], side)))
        captions = tokenizer.decode_batch([[id_ for id_ in tokens if len(SPECIALS) <= id_ < 4096] for tokens, _ in docs])
        found[side] = [(number_of[*captions[i - i % 2 :][:2]], *docs[i]) for i in range(len(docs))]
    return found


@pytest.fixture(scope="module")
def held_out(prepared, sides: dict[str, Side]) -> np.ndarray:
    """Returns bool [N], True for the pictures in the held-out files."""
    train, valid = ({number for number, _, _ in sides[side]} for side in ("train", "valid"))
    assert not train & valid
    assert train | valid == set(range(len(prepared.pictures.items)))
    return np.isin(np.arange(len(prepared.pictures.items)), list(valid))


def test_no_family_and_no_picture_like_another_crosses(prepared, sides: dict[str, Side], held_out: np.ndarray) -> None:
    assert len(prepared.pictures.items) > 3900
    assert len(sides["train"]) + len(sides["valid"]) == 2 * len(prepared.pictures.items)
    assert held_out.mean() == pytest.approx(0.1, rel=0.1)
    sides_of = defaultdict(set)
    for picture, held in zip(prepared.pictures.items, held_out.tolist(), strict=True):
        sides_of[picture.family].add(held)
    assert len(sides_of) > 1500
    assert {len(each) for each in sides_of.values()} == {1}
    codebook = load_codebook(prepared.folder / "codebook.npy")
    grids, mirrored = (
        encode(to_patches(np.stack([plain(each, mirrored=flip).pixels for each in prepared.division.rasters_N])), codebook)
        for flip in (False, True)
    )
    held = grids.reshape(-1, 64)[held_out]
    assert near_pairs(held, grids.reshape(-1, 64)[~held_out], most=8) == []
    assert near_pairs(held, mirrored.reshape(-1, 64)[~held_out], most=8) == []


def test_codes_and_filler_bits_are_those_of_a_new_render(prepared, sides: dict[str, Side]) -> None:
    codebook = load_codebook(prepared.folder / "codebook.npy")
    for side in sides.values():
        for place in range(0, len(side), 97):
            number, tokens, filler = side[place]
            picture = prepared.pictures.items[number]
            render = augmented(
                rasterise(picture.path, svg=True), seed=prepared.recipe.seed, key=picture.key, index=place % 2
            )
            codes = tokens >= 4096
            np.testing.assert_array_equal(tokens[codes] - 4096, encode(to_patches(render.pixels[None]), codebook))
            np.testing.assert_array_equal(filler[codes], render.empty.reshape(-1))
            assert not filler[~codes].any()


def test_only_training_pictures_are_rendered_for_the_codebook(prepared, held_out: np.ndarray) -> None:
    np.testing.assert_array_equal(prepared.division.held_out_N, held_out)
    held = {picture.key for picture, held in zip(prepared.pictures.items, held_out.tolist(), strict=True) if held}
    assert prepared.rendered
    assert not prepared.rendered & held


def test_the_python_sources_are_split_by_file(prepared) -> None:
    library = python_library()
    keys = [Path(text.key) for text in library.items]
    assert len(keys) > 400
    assert not any({"test", "tests", "idlelib", "site-packages"} & set(key.parts) for key in keys)
    assert len({text.family for text in library.items if text.key.startswith("encodings/")}) == 1
    section = prepared.manifest.sources["python"]
    train, valid = (
        {tokens.tobytes() for tokens, _ in documents(prepared.folder, split)} for split in (section.train, section.valid)
    )
    assert not train & valid
    assert section.train.documents + section.valid.documents == len(library.items)


def test_the_manifest_counts_and_credits(prepared) -> None:
    manifest = prepared.manifest
    assert manifest.vocab_size == 4096 + 512
    assert manifest.modalities == {"text": ((0, 4096),), "image": ((4096, 4608),)}
    assert (
        manifest.sources["openmoji"].train.tokens_by_modality["image"] == 64 * manifest.sources["openmoji"].train.documents
    )
    assert "CC BY-SA 4.0" in manifest.sources["openmoji"].licence
    assert "OpenMoji" in manifest.sources["openmoji"].attribution
    assert "PSF" in manifest.sources["python"].licence
    assert manifest.baselines["image/left_bigram"] < manifest.baselines["image/unigram"] - 1
