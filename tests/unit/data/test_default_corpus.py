"""The default corpus on disk: training and held-out documents share no picture variant, and its manifest is true."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.corpus_python import python_library
from moe_dist.data.indexed import IndexedSplit
from moe_dist.formats.manifest import SplitSection

pytestmark = [pytest.mark.slow, pytest.mark.full]  # preparing the whole default data takes 45 s


def documents(folder: Path, split: SplitSection | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    assert split is not None
    data = IndexedSplit(folder, split)
    for start, length in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True):
        yield data.tokens(start, length), data.filler(start, length)


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
