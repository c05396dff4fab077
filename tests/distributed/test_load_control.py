"""Load controllers compute the same biases as slow loops, and a skipped step changes no bias. test_kinds_on_ranks.py
compares controllers on N ranks with one rank, and test_resume.py resumes runs with controllers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moe_dist.train.objective.loss import AuxSettings
from tests.reference.layer import bias_steps
from tests.support.layouts import CONTROLLERS, GROUPS, LAYERS, SEQUENCES, E, Layout, Outcome, TrainingRank, batch_of, train
from tests.support.worlds import RankContext

AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)


def test_one_rank_equals_the_loops(run_in_world: Callable[..., list[Any]]) -> None:
    """Slow loops compute the biases after two steps from the counts of these steps."""
    one_rank: Outcome = run_in_world(1, train, Layout(balance=True))[0]
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


def skipped_step(rank: RankContext) -> tuple[bool, float, Any]:
    """Takes a step whose loss is not finite on one rank."""
    training = TrainingRank(Layout(2, 1, "pinned", balance=True))
    if rank.rank == 1:
        with torch.no_grad():
            training.parallel.parameters[0].parameter.fill_(float("nan"))
    each = SEQUENCES // 2
    result = training.step([batch_of(0, 0, rank.rank * each, each)], lr=1e-2, aux=AUX)
    biases = [b.abs().max().item() for n, b in training.parallel.model.named_buffers() if n.endswith(".bias")]
    balance: Any = training.step.controllers[0]
    return result.skipped, max(biases), balance.state()


def test_a_skipped_step_moves_no_bias(run_in_world: Callable[..., list[Any]]) -> None:
    assert run_in_world(2, skipped_step) == [(True, 0.0, {"step": 0})] * 2
