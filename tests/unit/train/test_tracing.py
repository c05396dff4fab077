"""A traced run on one rank: its counts are the records' counts, and its tokens those of the batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.monitor.trace.reader import read_trace
from moe_dist.plan.preflight import check
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.build import build_loader, build_plan
from moe_dist.train.resume import Progress
from moe_dist.train.session import traced_steps
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config

ENV = RankEnv(0, 1, 0, 1, init_method="", attempt=0, attempt_id="one")


def test_counts_of_a_trace_equal_those_of_the_records(tiny_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "monitor.trace": {"every": 2},
        "parallel.data": "fsdp2",
        "parallel.recompute": "block",  # the layers run twice
        "model.moe.capacity": {"factor": 1.0, "drop": "probability", "scope": "rank"},
    }
    with world_of_one():
        one = OneRank(tiny_data, tmp_path, **changes)
        plan, config = one.plan, one.plan.config
        loader, results, progress = build_loader(config, plan.manifest, rank=0, world_size=1), [], Progress()
        folder, step = RunFolder.of(config), one.training.step
        with traced_steps(plan, folder, ENV, progress, attempt_id="one") as tracer:
            step.tracer = tracer
            aux = build_plan(config, plan.manifest, plan.placement).aux(0)
            for number in range(3):
                batches = loader.batches(number * config.train.global_batch)
                results.append((batches, step(batches, lr=1e-3, aux=aux, number=number)))
    trace = read_trace(folder.path)
    assert trace.steps == (1, 3)
    for traced in trace.steps:
        batches, result = results[traced - 1]
        found = trace.step(traced)
        assert np.array_equal(found.choices(), result.counts.choices_LC)
        assert np.array_equal(found.dropped()[:, : plan.placement.num_experts], result.counts.dropped_LE)
        assert result.counts.dropped_LE.any()
        real = [~batch.padding_BS.flatten() for batch in batches]
        for name, tensors in (("token", [b.tokens_BS for b in batches]), ("modality", [b.modality_BS for b in batches])):
            expected = np.concatenate([t.flatten()[r].numpy() for t, r in zip(tensors, real, strict=True)])
            assert np.array_equal(found.tokens[name], expected)
        first = (traced - 1) * config.train.global_batch
        assert set(found.tokens["sequence"]) == set(range(first, first + config.train.global_batch))
        assert found.weights is not None
        taken_TLK = (found.ids >= 0) & (found.ids < plan.placement.num_experts)
        assert not found.weights[~taken_TLK].any()
        assert (found.weights[taken_TLK] > 0).all()


@pytest.mark.parametrize(
    "changes",
    [{"model.mixture_of_depths": {"capacity": 0.5}}, {"model.moe.router": {"kind": "expert_choice"}}],
)
def test_what_a_trace_cannot_store_is_refused(tiny_data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with refused(ConfigError, "monitor.trace", golden=False):
        check(tiny_config(tiny_data, tmp_path, {"monitor.trace": {"every": 1}, **changes}))
