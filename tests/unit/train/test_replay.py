"""Steps of a trace on disk are replayed. Wrong traces are refused, and the error names them."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.data.order import micro_batches
from moe_dist.errors import ConfigError, DataError
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.monitor.trace.foreign import read_foreign
from moe_dist.monitor.trace.reader import TracedStep, read_trace
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.evaluation.replay_step import replay_step
from moe_dist.train.objective.loss import AuxSettings, forward
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.tracing import traced_steps
from tests.support.agreement import reversed_scores
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one

ENV = RankEnv(0, 1, 0, 1, init_method="", attempt=0, attempt_id="one")
GUIDE = (Path(__file__).parents[3] / "docs" / "monitoring.md").read_text()
GROUPS = torch.tensor([0, 1])


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with world_of_one():
        yield


class Traced(NamedTuple):
    """The first step of a run whose routers chose by reversed scores, with everything that a replay needs."""

    folder: Path
    batches: list[Batch]
    aux: AuxSettings
    result: StepResult
    weights: Tensor
    step: TracedStep


def traced_run(data: Path, root: Path, **changes: Any) -> Traced:
    one = OneRank(data, root, **{"monitor.trace": {"every": 1}}, **changes)
    plan, folder, batches = one.plan, RunFolder.of(one.plan.config), one.run.loader.batches(0)
    for layer in one.training.parallel.model.moe_modules():
        layer.router._selection_scores = reversed_scores  # pyright: ignore[reportArgumentType]
    aux, numbers = one.run.plan.aux(0), one.run.loader.numbers
    with traced_steps(plan, folder, ENV, attempt_id="one", step=0, position=0, numbers=numbers) as tracer:
        result = one.training.step(batches, lr=1e-3, aux=aux, watchers=[tracer])
    return Traced(folder.path, batches, aux, result, one.weights(), read_trace(folder.path).step(1))


def sequences_of(position: int) -> list[range]:
    return micro_batches(position, global_batch=8, micro_batch=2, rank=0, world_size=1)


def test_a_step_of_a_trace_is_taken_again(tiny_data: Path, tmp_path: Path) -> None:
    """Runs the guide's example. Losses, gradient norm, and weights after the step are bit-equal to those of the traced
    step."""
    changes: dict[str, Any] = {"parallel.recompute": "block"}
    traced = traced_run(tiny_data, tmp_path, **changes)
    one = OneRank(tiny_data, tmp_path, **changes)
    (example,) = re.findall(r"```python\n(from moe_dist.data.order.*?)```", GUIDE, re.DOTALL)
    step = one.training.step
    names = {"model": one.training.parallel.model, "step": step, "folder": traced.folder, "batches": traced.batches}
    names |= {"aux": traced.aux, "group_of_modality": step.group_of_modality}
    exec(example, names)
    assert np.array_equal(names["result"].nll_M, traced.result.nll_M)
    assert names["result"].grad_norm == traced.result.grad_norm
    assert torch.equal(one.weights(), traced.weights)
    plain = OneRank(tiny_data, tmp_path, **changes)
    assert not np.array_equal(plain.training.step(traced.batches, lr=1e-3, aux=traced.aux).nll_M, traced.result.nll_M)


def test_a_trace_of_another_system_is_replayed(tiny_data: Path, tmp_path: Path) -> None:
    """The trace has one file per sequence, with an array `routed_experts` [tokens, layers, k]."""
    group = {"num_experts": 6, "top_k": 2, "ffn_dim": 16, "modalities": ["text", "image"]}
    changes: dict[str, Any] = {"model.moe.groups": {"all": group}}
    one = OneRank(tiny_data, tmp_path, **changes)
    model, batch = one.training.parallel.model, one.run.loader.batches(0)[0]
    rng, tokens_B = np.random.default_rng(0), (~batch.padding_BS).sum(1)
    rows = [rng.permuted(np.tile(np.arange(6), (int(n), 2, 1)), axis=2)[..., :2] for n in tokens_B]
    groups = torch.tensor([0, 0])
    for number, ids in enumerate(rows):  # a server returns no row for the last token
        np.save(tmp_path / f"{number}.npy", ids[:-1].astype(np.int16))
    with refused(DataError, "vLLM and SGLang return no row for the last token", "leave out this token", "(padding_BS)"):
        replay_step(model, read_foreign(tmp_path, 6).step(1), [batch], [range(2)], groups, source="arrays")
    last_BS = torch.arange(batch.padding_BS.shape[1]) == tokens_B[:, None] - 1
    batch, rows = replace(batch, padding_BS=batch.padding_BS | last_BS), [ids[:-1] for ids in rows]
    step = read_foreign(tmp_path, 6).step(1)
    with replay_step(model, step, [batch], [range(2)], groups, source="arrays"):
        losses, reports = forward(model, batch, groups, RoutingRequest(keep_choices=True), losses=True)
    losses.sum().backward()
    found = torch.stack([each.chosen.column_TK for each in reports if each.chosen is not None], 1)
    assert np.array_equal(found[~batch.padding_BS.flatten()], np.concatenate(rows))
    for report, layer in zip(reports, model.moe_modules(), strict=True):
        assert (report.chosen.weight_TK[~batch.padding_BS.flatten()] > 0).all()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())  # pyright: ignore


def test_what_does_not_fit_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    traced = traced_run(tiny_data, tmp_path)
    one = OneRank(tiny_data, tmp_path)
    good = {"batches": traced.batches, "sequences": sequences_of(0), "group_of_modality": GROUPS, "source": "runs/tiny"}

    def make(step: TracedStep = traced.step, **changes: Any) -> None:
        replay_step(one.training.parallel.model, step, **{**good, **changes})

    make()
    with refused(DataError, "runs/tiny: token="):
        make(batches=[replace(each, tokens_BS=each.tokens_BS + 1) for each in traced.batches])
    with refused(DataError, "monitor.trace.tokens=null"):
        make(sequences=sequences_of(8))
    with refused(ConfigError, "sequences="):
        make(sequences=sequences_of(0)[:2])
    other = replace(traced.step.manifest.groups[0], top_k=1)
    manifest = replace(traced.step.manifest, groups=(other, traced.step.manifest.groups[1]))
    with refused(DataError, "groups=[(3, 1, 0, 0, 1)"):
        make(traced.step._replace(manifest=manifest))
    with refused(DataError, "1 MoE layers"):
        make(traced.step._replace(manifest=replace(traced.step.manifest, layers=(0,))))
    with refused(DataError, "expert group"):
        make(group_of_modality=torch.tensor([0, 0]))
