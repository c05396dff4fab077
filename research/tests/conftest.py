"""Gives research's tests the fixtures of the product's tests, and a separate golden file for error messages."""

from pathlib import Path

import pytest

from research.tests.wordnet_files import write_wordnet
from tests.conftest import *  # noqa: F403
from tests.support import messages
from tests.unit.conftest import *  # noqa: F403

messages.GOLDEN = Path(__file__).parent / "messages.json"
NOUNS = [[f"noun{number}", *([f"other {number}"] if number % 7 == 0 else [])] for number in range(120)]


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns WordNet files of made-up nouns and opposites."""
    opposites = [(f"big{number}", f"small{number}") for number in range(60)]
    return write_wordnet(tmp_path_factory.mktemp("dict"), NOUNS, opposites)
