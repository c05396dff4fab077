"""Imports that some test files need on all ranks, and a fixture that runs a function under a training engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import worlds

# The servers import these modules before they fork the ranks, because the import takes 2 s of CPU time.
HEAVY = {
    "test_megatron_": ["megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.optimizer"],
    "test_hf_": ["transformers.modeling_utils"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {item.path.name for item in items}
    for prefix, modules in HEAVY.items():
        if any(name.startswith(prefix) for name in names):
            worlds.IMPORTED += modules


@pytest.fixture(scope="session")
def run_engine(run_in_world: Callable[..., list[Any]], tiny_data: Path) -> Callable[..., list[Any]]:
    """Returns `run_engine(changes, function, *arguments)`."""

    def run(changes: dict[str, Any], function: Callable[..., Any], *arguments: Any) -> list[Any]:
        world_size = changes["parallel.ep"] * changes["parallel.edp"]
        return run_in_world(world_size, function, str(tiny_data), changes, *arguments)

    return run
