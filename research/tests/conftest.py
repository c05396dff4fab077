"""Fixtures of the product's tests, for the tests of research, and a golden file of its own for texts of errors."""

from pathlib import Path

from tests.conftest import *  # noqa: F403
from tests.support import messages
from tests.unit.conftest import *  # noqa: F403

messages.GOLDEN = Path(__file__).parent / "messages.json"
