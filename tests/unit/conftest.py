"""A small run with pictures, and WordNet files of 120 made-up nouns."""

from pathlib import Path

import pytest

from tests.support.pictured import pictured_data, pictured_run
from tests.support.wordnet_files import write_wordnet

NOUNS = [[f"noun{number}", *([f"other {number}"] if number % 7 == 0 else [])] for number in range(120)]


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_data(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="session")
def own_run(own_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run into which tests may write results, and nothing else."""
    return pictured_run(own_data, tmp_path_factory.mktemp("runs"), max_seq_len=192)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    opposites = [(f"big{number}", f"small{number}") for number in range(60)]
    return write_wordnet(tmp_path_factory.mktemp("dict"), NOUNS, opposites)
