"""Fixtures of the unit tests: a small run with pictures, and a file of questions."""

from pathlib import Path

import pytest

from moe_dist.inference.fact import Fact, lemma_keys
from moe_dist.inference.questions.files import fact_lines
from tests.support.pictured import pictured_data, pictured_run

KINDS = ("animal", "plant", "tool", "food", "place")


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_data(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def own_run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder. Tests may add results to it, but must not change anything else."""
    return pictured_run(own_data, tmp_path_factory.mktemp("runs"), max_seq_len=192)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the facts of two tasks about 120 made-up nouns."""
    nouns = {f"noun{number}": KINDS[number % len(KINDS)] for number in range(120)}
    facts = {
        "nouns-definition": [Fact(each, f"Which word means: gloss of {each}?", each, lemma_keys([each])) for each in nouns],
        "nouns-category": [
            Fact(each, f'What is "{each}"?', kind, lemma_keys([each]), closed=KINDS) for each, kind in nouns.items()
        ],
    }
    path = tmp_path_factory.mktemp("facts") / "nouns.jsonl"
    path.write_text(fact_lines(facts))
    return path
