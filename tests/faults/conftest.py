"""The tests in this folder make whole runs fail. They take minutes, and have a longer time limit. `make test-faults` runs
them; `make test` does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.site import Site, open_site

SECONDS = 900


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Yields the folder of a campaign, with a small disk if mounting is permitted."""
    with open_site(tmp_path_factory.mktemp("site")) as place:
        yield place
