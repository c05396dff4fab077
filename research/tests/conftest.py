"""Fixtures of the product's tests, for the tests of research."""

from tests.conftest import *  # noqa: F403
from tests.unit.conftest import *  # noqa: F403
