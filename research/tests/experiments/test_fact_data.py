"""Each split of a closed set of facts has every fact once, and no two pictures of the set are nearly equal."""

from pathlib import Path

import pytest

from moe_dist.data.corpus import Picture, Recipe, Source
from moe_dist.data.corpus_files import picture_files
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.loader import heldout_batches
from moe_dist.data.tokenizer import load_tokenizer
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from research.experiments.fact_data import defined_words, drawn, make, one_of_each_family
from tests.support.messages import refused

RECIPE = Recipe(renders=1, val_fraction=0.0, vocab_size=300, codes=16, vary=())
DEFINITIONS, PICTURES = 12, 10


@pytest.fixture(scope="module")
def made(own_data: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "facts"
    shown = picture_files("openmoji", own_data.parent / "pictures", "CC0-1.0")
    make(out, drawn(defined_words(words), DEFINITIONS, 0), drawn(shown, PICTURES, 0), RECIPE, lambda *_: None)
    return out


def documents(folder: Path, source: str, side: str) -> list[list[int]]:
    data = IndexedSplit(folder, getattr(load_manifest(folder).sources[source], side))
    return [data.tokens(*each).tolist() for each in zip(data.starts_D.tolist(), data.lengths_D.tolist(), strict=True)]


def test_each_fact_stands_once_and_is_held_out_too(made: Path) -> None:
    tokenizer = load_tokenizer(made / "tokenizer.json")
    found = [tokenizer.decode(document[1:-1]) for document in documents(made, "facts", "train")]
    assert len(set(found)) == len(found) == DEFINITIONS
    for text in found:
        word, gloss = text.split(": ")
        assert gloss == f"gloss number {word.removeprefix('noun')}"
    assert len(documents(made, "openmoji", "train")) == PICTURES
    for source in ("facts", "openmoji"):
        assert documents(made, source, "valid") == documents(made, source, "train")


def test_held_out_sequences_and_baselines_are_there(made: Path) -> None:
    manifest = load_manifest(made)
    assert {"text/unigram", "image/unigram"} <= set(manifest.baselines)
    for source in manifest.sources:
        assert heldout_batches(made, manifest, source=source, seq_len=96, sequences=4, micro_batch=2, rank=0, world_size=1)


def test_nothing_is_overwritten(made: Path, words: Path) -> None:
    with refused(ConfigError, f"--out {made}"):
        make(made, defined_words(words), Source("openmoji", (), ""), RECIPE, lambda *_: None)


def test_one_picture_of_a_family_is_taken() -> None:
    every = tuple(Picture(key, family, Path("x.svg"), ()) for key, family in (("a", "1"), ("b", "2"), ("c", "1")))
    assert [each.key for each in one_of_each_family(Source("openmoji", every, "")).items] == ["a", "b"]


def test_drawn_facts_depend_on_the_seed_alone_and_must_be_there(words: Path) -> None:
    source = defined_words(words)
    assert drawn(source, 10, 1) == drawn(source, 10, 1) != drawn(source, 10, 2)
    assert set(drawn(source, 10, 1).items) < set(source.items)
    assert drawn(source, len(source.items), 3) == source
    with refused(ConfigError, "facts: 121"):
        drawn(source, 121, 1)
