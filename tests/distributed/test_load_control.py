"""Load controllers set the same biases as slow loops, continue from a checkpoint of another layout, and change no bias in a
skipped step. test_kinds_on_ranks.py compares their layouts with one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.comm.collectives import CommStats
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.parallel.mesh import make_mesh
from moe_dist.train.build.routing import build_balance
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step.result import StepResult
from moe_dist.train.step.training_step import TrainingStep
from tests.reference.layer import bias_steps
from tests.support.cover import full
from tests.support.layouts import (
    CONTROLLERS,
    GROUPS,
    LAYERS,
    MICRO_BATCHES,
    SEQUENCES,
    STEPS,
    E,
    Layout,
    Outcome,
    batch_of,
    build,
    config_of,
    placement_of,
    train,
)
from tests.support.worlds import RankContext

AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)
ALONE = Layout(balance=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def one_rank(run_in_world: Callable[..., list[Any]], start: Path) -> Outcome:
    return run_in_world(1, train, ALONE, start)[0]


def test_one_rank_equals_the_loops(one_rank: Outcome) -> None:
    """The slow reference computes the biases after three steps from the steps' counts."""
    assert len(one_rank.biases) == LAYERS * len(GROUPS)
    target: Any = CONTROLLERS[0]["target"]
    for layer in range(LAYERS):
        for index, group in enumerate(GROUPS):
            bias = [0.0] * group.num_experts
            for number, step in enumerate(one_rank.steps):
                bias = bias_steps(
                    bias,
                    step.counts.choices_LC[layer, group.experts].tolist(),
                    int(step.counts.tokens_LG[layer, index]),
                    top_k=group.top_k,
                    target=target[group.name],
                    rate=0.5 / (1 + number / 2),
                    per_expert=True,
                    sign_rate=0.01,
                )
            got = one_rank.biases[f"layers.{layer}.moe.router.{group.name}.bias"]
            np.testing.assert_allclose(got[: group.num_experts], bias, rtol=0, atol=1e-12)
            assert not got[group.num_experts :].any()
    first, last = (step.counts.choices_LC[:, :E] for step in (one_rank.steps[0], one_rank.steps[-1]))
    assert (first != last).any()


SAVED_AT, LAST = 3, 7


class Controlled:
    """One rank of a run with controllers, which saves and resumes."""

    def __init__(self, rank: RankContext, layout: Layout, folder: Path) -> None:
        self.rank, mesh, comm_stats = rank, make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0), CommStats()
        self.parallel, placement = build(layout, mesh, comm_stats), placement_of(layout.placement, layout.ep)
        groups = split_parameters(self.parallel.model, weight_decay=0.1)
        self.optimizer = make_optimizer(groups, backend="torch", lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        routers = [layer.router for layer in self.parallel.model.moe_modules()]
        balance = build_balance(config_of(layout).model.moe, routers, placement.groups, mesh.device)
        assert balance is not None
        self.balance = balance
        self.step = TrainingStep(
            self.parallel, self.optimizer, placement=placement, group_of_modality=[0, 1], clip_norm=0.5,
            comm_stats=comm_stats,
            controllers=[balance],
        )  # fmt: skip
        self.layout = RankLayout(placement, mesh.rank, mesh.world_size, mesh.ep_rank, mesh.edp_rank, mesh.edp_size)
        self.manager = CheckpointManager(folder, keep=2, lease_check=lambda: None, process_group=mesh.checkpoint)

    def save(self) -> None:
        values = {"controllers": {"balance": self.balance.state()}}
        self.manager.save(SAVED_AT, capture(self.parallel.model, self.optimizer, self.layout, values=values))

    def load(self) -> None:
        newest = self.manager.latest()
        assert newest is not None
        restored = self.manager.load(newest, capture(self.parallel.model, self.optimizer, self.layout))
        states: Any = restored.values["controllers"]
        self.balance.restore(states["balance"])

    def train(self, first: int, last: int) -> list[tuple[list[float], np.ndarray, dict[str, np.ndarray]]]:
        """Returns losses, norm, choices and biases after each step."""
        each, seen = SEQUENCES // self.rank.world_size, []
        for number in range(first, last):
            batches = [batch_of(number, micro, self.rank.rank * each, each) for micro in range(MICRO_BATCHES)]
            result: StepResult = self.step(batches, lr=1e-2, aux=AUX)
            biases = {n: b.numpy().copy() for n, b in self.parallel.model.named_buffers() if n.endswith(".bias")}
            seen.append(([*result.nll_M.tolist(), result.grad_norm], result.counts.choices_LC, biases))
        return seen


def undisturbed(rank: RankContext, layout: Layout, folder: Path) -> list[Any]:
    run = Controlled(rank, layout, folder)
    before = run.train(0, SAVED_AT)
    run.save()
    return before + run.train(SAVED_AT, LAST)


def resumed(rank: RankContext, layout: Layout, folder: Path) -> list[Any]:
    run = Controlled(rank, layout, folder)
    run.load()
    return run.train(SAVED_AT, LAST)


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (Layout(2, 1, "pinned", "fsdp2", balance=True), Layout(4, 1, "uneven", balance=True)),
        full(Layout(2, 2, "interleaved", balance=True), Layout(1, 1, balance=True)),
    ],
    ids=str,
)
def test_biases_and_step_go_on_on_another_layout(
    run_in_world: Callable[..., list[Any]], tmp_path: Path, writer: Layout, reader: Layout
) -> None:
    whole = run_in_world(writer.world_size, undisturbed, writer, tmp_path)[0][SAVED_AT:]
    for seen in run_in_world(reader.world_size, resumed, reader, tmp_path):
        for (losses, choices, biases), (losses_, choices_, biases_) in zip(seen, whole, strict=True):
            np.testing.assert_array_equal(choices, choices_)
            for name, bias in biases_.items():
                np.testing.assert_array_equal(biases[name], bias, err_msg=name)
            np.testing.assert_allclose(losses, losses_, rtol=1e-9)


def skipped_step(rank: RankContext) -> tuple[bool, float, Any]:
    """Takes a step whose loss is not finite on one rank."""
    layout = Layout(2, 1, "pinned", balance=True)
    run = Controlled(rank, layout, Path("unused"))
    if rank.rank == 1:
        with torch.no_grad():
            run.parallel.parameters[0].parameter.fill_(float("nan"))
    each = SEQUENCES // 2
    result = run.step([batch_of(0, 0, rank.rank * each, each)], lr=1e-2, aux=AUX)
    biases = [b.abs().max().item() for n, b in run.parallel.model.named_buffers() if n.endswith(".bias")]
    return result.skipped, max(biases), run.balance.state()


def test_a_skipped_step_moves_no_bias(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, skipped_step) == [(True, 0.0, {"step": 0})] * 2


def test_the_rest_of_the_run_is_as_without(run_in_world: Callable[..., list[Any]]) -> None:
    """A controller acts after the optimizer, so it does not change the gradients of the first step."""
    with_one: Outcome = run_in_world(1, train, ALONE)[0]
    without: Outcome = run_in_world(1, train, Layout())[0]
    for name, gradient in without.gradients.items():
        np.testing.assert_array_equal(with_one.gradients[name], gradient, err_msg=name)
    assert without.biases == {}
    assert STEPS == 3
