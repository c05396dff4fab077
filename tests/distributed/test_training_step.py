"""All ranks skip a step if a value is not finite on one rank. Also tests a step's drops, timings and gradient buffers."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moe_dist.monitor.metrics import group_metrics
from moe_dist.optim.optimizer import step_count
from moe_dist.placement.parameter_names import EXPERTS, ROUTERS, Role
from moe_dist.train.objective.loss import AuxSettings, forward
from moe_dist.train.step import training_step
from moe_dist.train.step.result import StepResult
from tests.support.cover import full
from tests.support.layouts import Layout, TrainingRank, batch_of
from tests.support.worlds import RankContext


def poisoned_training(
    rank: RankContext, layout: Layout, where: str
) -> tuple[list[StepResult], list[dict[str, np.ndarray]], int]:
    """Takes three steps. In the second step, rank 1's activations or the gradient of one layer's expert output are not
    finite."""
    training, poison = TrainingRank(layout), {"on": False}
    model: Any = training.parallel.model
    target = model.norm if where == "activation" else model.layers[0].moe.experts

    def spoil_output(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if poison["on"] else output

    def spoil_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if poison["on"]:
            output.register_hook(lambda gradient: gradient * float("inf"))

    target.register_forward_hook(spoil_output if where == "activation" else spoil_gradient)
    results, parameters = [], [training.logical()]
    for number in range(3):
        poison["on"] = rank.rank == 1 and number == 1
        batches = [batch_of(number, 0, 2 + 2 * rank.rank, 2)]
        told = (10.0, 20.0 + rank.rank, 3.0 * rank.rank)
        with mock.patch.object(training_step, "largest_memory", return_value=told):
            results.append(
                training.step(
                    batches,
                    lr=1e-2,
                    aux=AuxSettings("null_averaged", 0.02, 1e-3),
                    stop_requested=rank.rank == 1 and number == 2,
                    began=time.perf_counter() - 1000.0 * rank.rank,  # rank 1 seems to have read data for 1000 s
                )
            )
        parameters.append(training.logical())
    return results, parameters, step_count(training.optimizer)


@pytest.mark.parametrize(
    ("data", "where"),
    [("ddp", "activation"), full("ddp", "gradient"), full("fsdp2", "activation"), ("fsdp2", "gradient")],
)
def test_one_bad_rank_makes_all_skip(run_in_world: Callable[..., list[Any]], data: str, where: str) -> None:
    for results, parameters, steps_taken in run_in_world(2, poisoned_training, Layout(2, 1, "pinned", data), where):
        assert [result.skipped for result in results] == [False, True, False]
        assert not np.isfinite(results[1].grad_norm)
        assert np.isfinite(results[2].grad_norm)
        assert [result.stop_requested for result in results] == [False, False, True]
        changed = [any((a[name] != b[name]).any() for name in a) for a, b in itertools.pairwise(parameters)]
        assert changed == [True, False, True]
        assert steps_taken == 2
        assert [result.busy_seconds_W.size for result in results] == [0, 2, 2]  # the next step exchanges the times
        for result in results[1:]:
            quick, slow = result.busy_seconds_W
            assert 0.0 <= quick < 1000.0 <= slow
            assert result.memory_W3.tolist() == [[10.0, 20.0, 0.0], [10.0, 21.0, 3.0]]


def capped_step(rank: RankContext, layout: Layout) -> tuple[StepResult, int]:
    """Takes one step with a capacity. Also returns the pairs that the first layer takes from the same batch in
    evaluation."""
    training, batch = TrainingRank(layout), batch_of(0, 0, 2 + 2 * rank.rank, 2)
    model, step = training.parallel.model, training.step
    model.eval()
    with torch.no_grad():
        _, reports = forward(model, batch, step.group_of_modality)
    model.train()
    pairs = reports[0].sent.pairs
    return step([batch], lr=0.0, aux=AuxSettings("null_averaged", 0.02, 1e-3)), pairs


@pytest.mark.parametrize("recompute", [full("none"), "block"])
def test_what_a_capacity_drops_is_counted_over_ranks_and_never_in_evaluation(
    run_in_world: Callable[..., list[Any]], recompute: str
) -> None:
    layout = Layout(2, 1, "interleaved", recompute=recompute, capacity=0.75)
    ranks = run_in_world(2, capped_step, layout)
    for result, _ in ranks:
        true = sum(group.num_experts for group in layout.groups)
        dropped = result.counts.dropped_LE.sum()
        assert 0 < dropped < result.counts.choices_LC[:, :true].sum()
        assert (result.counts.dropped_LE <= result.counts.choices_LC[:, :true]).all()
        assert result.ledger["pairs"] == result.counts.choices_LC[:, :true].sum() - dropped
        # The first layer has the same input in evaluation as in training, and evaluation drops no true choice.
        assert sum(first for _, first in ranks) == result.counts.choices_LC[0, :true].sum()


def step_of_two_batches(rank: RankContext, layout: Layout) -> Callable[[], StepResult]:
    """Returns a function that takes a step on two fixed micro-batches, with learning rate 0."""
    batches = [batch_of(number, 0, 2 + 2 * rank.rank, 2) for number in range(2)]
    return partial(TrainingRank(layout).step, batches, lr=0.0, aux=AuxSettings("null_averaged", 0.02, 1e-3))


def two_steps(rank: RankContext, layout: Layout) -> list[StepResult]:
    take = step_of_two_batches(rank, layout)
    return [take(), take()]


def kept_gradients(rank: RankContext, layout: Layout) -> tuple[set[Role], bool, bool]:
    """Returns the roles of parameters whose gradients stay allocated after a step, whether these gradients are zero,
    and whether their addresses stay the same."""
    take = step_of_two_batches(rank, layout)
    kept = []
    for _ in range(3):
        take()
        parameters = take.func.parallel.parameters  # pyright: ignore[reportFunctionMemberAccess]
        kept.append([(each.role, each.parameter.grad) for each in parameters if each.parameter.grad is not None])
    places = [[gradient.data_ptr() for _, gradient in each] for each in kept]
    return {role for role, _ in kept[0]}, not any(gradient.any() for _, gradient in kept[-1]), places[0] == places[2]


def test_gradients_of_ddp_are_added_up_in_its_buckets(run_in_world: Callable[..., list[Any]]) -> None:
    """Otherwise a step of several micro-batches would keep each dense gradient twice: in DDP's bucket and outside of it."""
    for roles, zero, in_place in run_in_world(2, kept_gradients, Layout(2, 1, "interleaved")):
        assert roles
        assert not roles & (ROUTERS | EXPERTS)
        assert zero
        assert in_place
    assert run_in_world(2, kept_gradients, Layout(2, 1, "interleaved", "fsdp2"))[0][0] == set()


def test_a_capacity_factor_of_the_largest_load_in_a_micro_batch_drops_nothing(
    run_in_world: Callable[..., list[Any]],
) -> None:
    layout = Layout(2, 1, "interleaved")
    (first, free), (_, same) = run_in_world(2, two_steps, layout)
    assert first.busiest_G.size == 0
    assert (free.busiest_G == same.busiest_G).all()
    needed = float(free.busiest_G.max())
    used = group_metrics(free.counts.choices_LC, free.counts.tokens_LG, layout.groups)["capacity_used"]
    assert (free.busiest_G >= used.max(0)).all(), "a micro-batch is less even than the step"
    for factor, drops in ((needed, False), (0.8 * needed, True)):
        (_, capped), _ = run_in_world(2, two_steps, replace(layout, capacity=factor))
        assert (capped.counts.dropped_LE.sum() > 0) == drops


def test_each_ranks_data_and_loss_are_known_in_the_next_step(run_in_world: Callable[..., list[Any]]) -> None:
    (first, second), (_, other) = run_in_world(2, two_steps, Layout(2, 1, "interleaved"))
    assert first.data_D3.size == 0
    assert (second.data_D3 == other.data_D3).all()
    digest_D, nats_D, labels_D = second.data_D3.T
    assert 0 < digest_D[0] != digest_D[1] > 0
    assert nats_D.sum() == pytest.approx(first.nll_M.sum())
    assert nats_D.all()
    assert labels_D.sum() == first.labels_M.sum()
    assert second.words_DK.sum() == first.tokens
    assert (second.words_DK[0] != second.words_DK[1]).any()
    scale_D = second.total_D / nats_D * labels_D.sum()
    assert scale_D.tolist() == pytest.approx([1.0, 1.0], abs=0.05), "the rest is the balance loss"
