"""Counts the files that a training step of the default job visits on rank 0.

The step runs from the loop through loader, model, loss and optimizer to the records, and is traced.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import moe_dist
from tests.support.one_rank import OneRank, world_of_one

MOST = 35
ROOM = Path(moe_dist.__file__).parent


def files_entered(action: Callable[[], Any]) -> set[str]:
    """Returns the files of moe_dist in which a function is called, on any thread, because autograd runs backward in its
    own."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {str(Path(name).relative_to(ROOM)) for name in entered if name.startswith(f"{ROOM}/")}


@pytest.fixture
def step_of(tiny_data: Path, tmp_path: Path) -> Any:
    """Returns a step of a run with the default router, dispatcher and sinks on one rank."""
    changes: dict[str, Any] = {
        "loss.balance.scope": "micro_batch",  # as in the default job
        "monitor.sinks": [{"kind": "console", "every": 1}, {"kind": "jsonl"}, {"kind": "tensorboard"}],
    }
    with world_of_one(), OneRank(tiny_data, tmp_path, **changes).trainer() as trainer:
        yield trainer._step


def test_a_step_is_followed_in_few_files(step_of: Callable[[], Any]) -> None:
    for _ in range(2):  # the first steps also fill caches; TensorBoard gets its last new tag in the second step
        step_of()
    entered = files_entered(step_of)
    assert {
        "train/loop/trainer.py",
        "train/step/training_step.py",
        "moe/layer.py",
        "data/loader.py",
        "monitor/sinks/jsonl.py",
    } <= entered
    assert len(entered) <= MOST, sorted(entered)
