"""Weights, updates and gradients of a step are measured equally on all layouts of ranks and by all engines."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import full
from tests.support.engine_run import megatron, ranks, started_run
from tests.support.worlds import RankContext

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, ranks(1)),
    "ddp, ep": (4, ranks(2, 2)),
    "fsdp2, ep": (4, {**ranks(2, 2), "parallel.data": "fsdp2"}),
    "megatron, tp, pp": (4, {**ranks(1, 4), **megatron(tp=2, pp=2)}),
    "megatron, ep": (4, {**ranks(2, 2), **megatron()}),
}
CASES = [pytest.param("ddp, ep", marks=pytest.mark.slow), *map(full, ("fsdp2, ep", "megatron, tp, pp", "megatron, ep"))]


def measured(rank: RankContext, data: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table of the third step: norms of weight, update and gradient by name."""
    with started_run(rank, data, changes) as run:
        saver = run.saver()
        watch = saver.weight_watch()
        assert watch is not None
        for step in range(3):
            run.training.step(
                run.loader.batches(step * run.config.train.global_batch),
                lr=run.plan.lr(step), aux=run.plan.aux(step), number=step,
                around_update=watch.around_update() if step == 2 else None,
            )  # fmt: skip
        table = watch.take()
        assert table is not None
        assert watch.take() is None
        return dict(zip(table.names, np.sqrt(table.squares_N3).tolist(), strict=True))


@pytest.mark.parametrize("layout", CASES)
def test_all_layouts_measure_the_same(run_in_world: Callable[..., list[Any]], tiny_data: Path, layout: str) -> None:
    """Shards are sampled at other elements than whole tensors, so their norms are only close."""
    (alone,) = run_in_world(1, measured, str(tiny_data), LAYOUTS["one rank"][1])
    world, changes = LAYOUTS[layout]
    for found in run_in_world(world, measured, str(tiny_data), changes):
        assert found.keys() == alone.keys()
        names = [*alone]
        ratio_N3 = np.array([found[name] for name in names]) / np.maximum([alone[name] for name in names], 1e-30)
        assert abs(np.median(ratio_N3, axis=0) - 1).max() < 0.03
        assert ((ratio_N3 > 0.5) & (ratio_N3 < 2)).mean() > 0.97
