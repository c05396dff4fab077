"""All ranks use the same kernels, also if the trial of the kernels fails on one rank only."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dist.errors import ConfigError
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.kernels.triton_kernels import TRITON
from moe_dist.train.build import training
from tests.support.tiny import tiny_config
from tests.support.worlds import RankContext


def chosen(rank: RankContext, failing: tuple[int, ...], part: str, fallback: bool) -> str:
    """Returns the name of the kernels that the rank gets, or the error."""
    settings = {"parallel.kernels.fallback": fallback, "parallel.ep": rank.world_size}
    config, reason = tiny_config(rank.folder, rank.folder, settings), "wrong sums" if rank.rank in failing else None
    rows = (TORCH, reason) if part == "rows" and reason else (TRITON, None)
    with (
        mock.patch.object(training, "choose_kernels", return_value=rows),
        mock.patch.object(training.dense_kernels, "why_not", return_value=reason),
    ):
        try:
            kernels = training.row_kernels(config, torch.device("cpu"), dist.group.WORLD)
        except ConfigError as error:
            return str(error)
    return "torch" if kernels is TORCH else "triton"


@pytest.mark.parametrize("part", ["rows", "dense parts"])
def test_one_failed_trial_decides_for_all_ranks(run_in_world: Callable[..., list[Any]], part: str) -> None:
    assert run_in_world(2, chosen, (), part, False) == ["triton", "triton"]
    assert run_in_world(2, chosen, (1,), part, True) == ["torch", "torch"]
    first, second = run_in_world(2, chosen, (1,), part, False)
    assert "rank 1 cannot use Triton kernels" in first
    assert "wrong sums" in second
    assert all("set parallel.kernels.fallback=true" in each for each in (first, second))
