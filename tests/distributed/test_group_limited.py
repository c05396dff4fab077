"""The group-limited router under every dispatcher: N ranks equal one rank, with null and constant experts, a controller of
the bias, and groups by modality."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cover import others_full
from tests.support.layouts import Layout, Outcome, train
from tests.support.outcomes import assert_same_tensors

LAYOUTS = [
    Layout(2, 1, "pinned", limited=True, balance=True),
    Layout(2, 2, "interleaved", "fsdp2", "block", limited=True, balance=True),
    Layout(4, 1, "uneven", "ddp", "experts", limited=True, balance=True),
    Layout(4, 1, "interleaved", limited=True, balance=True, overlap=True, chunks=2),
    Layout(4, 1, "uneven", "ddp", "block", limited=True, balance=True, ranks_per_node=2),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def one_rank(run_in_world: Callable[..., list[Any]], start: Path) -> Outcome:
    return run_in_world(1, train, Layout(limited=True, balance=True), start)[0]


@pytest.mark.parametrize("layout", others_full(LAYOUTS, keep=1), ids=str)
def test_ranks_equal_one_rank(
    run_in_world: Callable[..., list[Any]], start: Path, one_rank: Outcome, layout: Layout
) -> None:
    outcomes = run_in_world(layout.world_size, train, layout, start)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, one_rank.steps, strict=True):
            np.testing.assert_array_equal(step.counts.choices_LC, expected.counts.choices_LC)
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(
                [step.grad_norm, step.balance, step.z], [expected.grad_norm, expected.balance, expected.z], rtol=1e-9
            )
            if layout.ranks_per_node is None:  # the hierarchical dispatcher counts the rows of two hops
                assert 0 < step.ledger["rows_remote"] <= step.ledger["rows_bound"]
        for name, bias in one_rank.biases.items():
            np.testing.assert_array_equal(outcome.biases[name], bias, err_msg=name)
        assert outcome.events == outcomes[0].events
    assert_same_tensors(outcomes, one_rank)


def test_null_and_constant_experts_are_chosen_and_biases_move(one_rank: Outcome) -> None:
    choices_LC = sum(step.counts.choices_LC for step in one_rank.steps)
    assert (choices_LC[:, 8:13].sum(1) > 0).all()  # null columns
    assert (choices_LC[:, 13:].sum(1) > 0).all()
    assert all(bias.any() for bias in one_rank.biases.values())
