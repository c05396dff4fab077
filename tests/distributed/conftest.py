"""Imports that some test files need on all ranks, and a fixture that runs a function under a training engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

from tests.support import worlds

# The servers import these modules before they fork the ranks, because the import takes 2 s of CPU time. The files that need
# the modules come first and run on one worker, so that the servers of the other workers import none of the modules.
HEAVY = {
    "test_megatron_": ["megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.optimizer"],
    "test_hf_": ["transformers.modeling_utils"],
    "test_attached": [],  # uses both packages
}
NEEDED: list[str] = []  # modules for the collected files


def is_heavy(file: Path) -> bool:
    return file.name.startswith(tuple(HEAVY))


class _HeavyFilesTogether(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "heavy files" if is_heavy(Path(file)) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    return _HeavyFilesTogether(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not is_heavy(item.path))
    names = {item.path.name for item in items}
    for prefix, modules in HEAVY.items():
        if any(name.startswith(prefix) for name in names):
            NEEDED.extend(modules)


@pytest.fixture(scope="module", autouse=True)
def _imported(request: pytest.FixtureRequest) -> None:
    if is_heavy(request.path):
        worlds.IMPORTED += NEEDED
        NEEDED.clear()


@pytest.fixture(scope="session")
def run_engine(run_in_world: Callable[..., list[Any]], tiny_data: Path) -> Callable[..., list[Any]]:
    """Returns `run_engine(changes, function, *arguments)`."""

    def run(changes: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        world_size = changes["parallel.ep"] * changes["parallel.edp"]
        return run_in_world(world_size, function, str(tiny_data), changes, *arguments)

    return run
