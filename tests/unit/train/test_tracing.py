"""The trace of a run on one rank has the same counts as the run's records, and the same tokens as its batches."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError
from moe_dist.monitor.trace.reader import Trace, read_trace
from moe_dist.plan.preflight import check
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.tracing import traced_steps
from tests.support.cover import full
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config

ENV = RankEnv(0, 1, 0, 1, init_method="", attempt=0, attempt_id="one")


class Traced(NamedTuple):
    """The trace of three training steps, two numbers of the configuration, and the batches and result of each step."""

    trace: Trace
    num_experts: int
    global_batch: int
    steps: list[tuple[list[Batch], StepResult]]


def take_steps(tiny_data: Path, tmp_path: Path, changes: dict[str, Any]) -> Traced:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path, **changes)
        plan, config = one.plan, one.plan.config
        loader, steps = one.run.loader, []
        folder, aux = RunFolder.of(config), one.run.plan.aux(0)
        with traced_steps(plan, folder, ENV, attempt_id="one", step=0, position=0, numbers=loader.numbers) as tracer:
            for number in range(3):
                batches = loader.batches(number * config.train.global_batch)
                due = tracer if tracer.due(number) else None
                steps.append(
                    (batches, one.training.step(batches, lr=1e-3, aux=aux, number=number, watchers=[due] if due else []))
                )
    return Traced(read_trace(folder.path), plan.placement.num_experts, config.train.global_batch, steps)


def real_tokens(batches: list[Batch], name: str) -> np.ndarray:
    """Returns a field of the batches without padding."""
    return np.concatenate([getattr(each, name)[~each.padding_BS].numpy() for each in batches])


def test_counts_of_a_trace_equal_those_of_the_records(tiny_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "monitor.trace": {"every": 2},
        "parallel.data": "fsdp2",
        "parallel.recompute": "block",  # block recompute runs the layers twice
        "model.moe.capacity": {"factor": 1.0, "drop": "probability", "scope": "rank"},
    }
    run = take_steps(tiny_data, tmp_path, changes)
    assert run.trace.steps == (1, 3)
    for traced in run.trace.steps:
        batches, result = run.steps[traced - 1]
        found = run.trace.step(traced)
        assert np.array_equal(found.choices(), result.counts.choices_LC)
        assert np.array_equal(found.dropped()[:, : run.num_experts], result.counts.dropped_LE)
        assert result.counts.dropped_LE.any()
        assert np.array_equal(found.tokens["token"], real_tokens(batches, "tokens_BS"))
        assert np.array_equal(found.tokens["modality"], real_tokens(batches, "modality_BS"))
        first = (traced - 1) * run.global_batch
        assert set(found.tokens["sequence"]) == set(range(first, first + run.global_batch))
        taken_TLK = (found.ids >= 0) & (found.ids < run.num_experts)
        assert not found.weights[~taken_TLK].any()
        assert (found.weights[taken_TLK] > 0).all()


def test_a_trace_of_some_tokens_has_the_first_ones(tiny_data: Path, tmp_path: Path) -> None:
    everything = take_steps(tiny_data, tmp_path / "all", {"monitor.trace": {"every": 3}})
    # the tokens of one micro-batch, and five of the next
    tokens = len(real_tokens(everything.steps[0][0][:1], "tokens_BS")) + 5
    some = take_steps(tiny_data, tmp_path / "some", {"monitor.trace": {"every": 3, "tokens": tokens, "weights": False}})
    whole, found = everything.trace.step(1), some.trace.step(1)
    assert some.trace.steps == everything.trace.steps == (1,)
    assert len(everything.steps[0][0]) > 1
    assert np.array_equal(found.tokens, whole.tokens[:tokens])
    assert np.array_equal(found.ids, whole.ids[:tokens])
    assert len(found.ids) == tokens < len(whole.ids)
    assert found.weights is None


@pytest.mark.parametrize(
    "router", [{"kind": "expert_choice", "causal": "threshold"}, full({"kind": "expert_threshold", "warmup_steps": 1})]
)
def test_a_trace_of_training_has_the_tokens_that_experts_chose(
    tiny_data: Path, tmp_path: Path, router: dict[str, Any]
) -> None:
    """A token may take all experts of its group, although top_k is 1."""
    group = {"num_experts": 3, "top_k": 1, "ffn_dim": 16}
    changes = {
        "monitor.trace": {"every": 1},
        "parallel.recompute": "block",
        "model.moe.router": router,
        "model.moe.groups": {"text": group, "image": {**group, "num_experts": 2}},
        "loss.balance.schedule": [[0, 0.0]],
    }
    run = take_steps(tiny_data, tmp_path, changes)
    for traced, (batches, result) in enumerate(run.steps, start=1):
        found = run.trace.step(traced)
        assert np.array_equal(found.choices(), result.counts.choices_LC)
        idle = ((found.ids < 0).all(2) & (found.tokens["modality"] == 0)[:, None]).sum(0)
        assert np.array_equal(idle, result.counts.unrouted_LG[:, 0])
        assert idle.any()
        assert np.array_equal(found.tokens["token"], real_tokens(batches, "tokens_BS"))
        assert found.ids.shape[2] == 3
        assert (found.ids >= 0).sum(2).max() > 1


def test_what_a_trace_cannot_store_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"monitor.trace": {"every": 1}, "model.mixture_of_depths": {"capacity": 0.5}}
    with refused(ConfigError, "monitor.trace", golden=False):
        check(tiny_config(tiny_data, tmp_path, changes))
