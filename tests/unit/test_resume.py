from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.checkpoint.generators import generator_states, restore_generators
from moe_dist.checkpoint.manager import Restored
from moe_dist.errors import DataError
from moe_dist.resume import progress_of
from moe_dist.trainer import Progress
from tests.support.tiny import tiny_config

GOOD = {"step": 4, "position": 32, "tokens": 1000, "skipped_steps": 2, "skipped_in_a_row": 1, "evaluated": 4}


def found(progress: Any, tmp_path: Path, *, step: int = 4) -> Progress:
    restored = Restored(step, {"progress": progress}, {})
    return progress_of(restored, tiny_config(tmp_path, tmp_path), Path("step_4"))


def test_counters_come_back(tmp_path: Path) -> None:
    assert found(GOOD, tmp_path) == Progress(**GOOD)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 3},
        {"position": 31},
        {"position": 33},
        {"tokens": 32 * 64 + 1},
        {"tokens": -1},
        {"tokens": True},
        {"tokens": 1.0},
        {"tokens": "1"},
        {"tokens": None},
        {"tokens": 1 << 70},
        {"skipped_steps": 5},
        {"skipped_in_a_row": 3},
        {"evaluated": 5},
        {"surplus": 0},
    ],
    ids=str,
)
def test_counters_that_contradict_each_other_are_a_data_error(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="counters"):
        found({**GOOD, **change}, tmp_path)


@pytest.mark.parametrize("progress", [None, [], 3, {}, {"step": 4}], ids=str)
def test_no_counters_are_a_data_error(tmp_path: Path, progress: Any) -> None:
    with pytest.raises(DataError):
        found(progress, tmp_path)


def test_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    cpu = torch.device("cpu")
    states = generator_states(cpu)
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist())
    restore_generators(states, cpu)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()) == drawn


@pytest.mark.parametrize(
    "change",
    [
        {"torch": "00"},
        {"torch": "zz"},
        {"torch": 5},
        {"python": [3, [1], None]},
        {"python": None},
        {"numpy": ["MT", [], 1]},
    ],
    ids=str,
)
def test_states_that_are_none_are_a_data_error(change: dict[str, Any]) -> None:
    cpu = torch.device("cpu")
    before = generator_states(cpu)
    with pytest.raises(DataError, match="generators"):
        restore_generators({**before, **change}, cpu)  # type: ignore[arg-type]
    restore_generators(before, cpu)
