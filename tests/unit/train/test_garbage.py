"""No tensor is in a reference cycle, so a run frees all memory without the garbage collector."""

import gc
from pathlib import Path

import pytest
import torch

from moe_dist.train.loop import trainer
from moe_dist.train.loop.garbage import collected_by_steps
from tests.support.engine_run import take_steps
from tests.support.one_rank import OneRank, world_of_one


def test_steps_leave_no_tensor_to_the_collector(tiny_data: Path, tmp_path: Path) -> None:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path)
        take_steps(one.run, 0, 1)
        with collected_by_steps():
            take_steps(one.run, 1, 3)
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                gc.collect()
                left = [each for each in gc.garbage if isinstance(each, torch.Tensor)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
    assert left == []


def test_a_collection_comes_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: taken.append(1))
    trainer._collect(50)
    assert not taken, "automatic collections are on"
    with collected_by_steps():
        begun = len(taken)
        for step in (49, 50, 51, 100):
            trainer._collect(step)
        assert len(taken) - begun == 2
        assert not gc.isenabled()
    assert gc.isenabled()
