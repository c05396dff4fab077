"""Imports slow modules once in the servers from which the ranks of some test files are forked."""

import pytest

from tests.support import worlds

# Each import would take 2 s of CPU time on each rank.
HEAVY = {
    "test_megatron_": ["megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.optimizer"],
    "test_hf_": ["transformers.modeling_utils"],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {item.path.name for item in items}
    for prefix, modules in HEAVY.items():
        if any(name.startswith(prefix) for name in names):
            worlds.IMPORTED += modules
