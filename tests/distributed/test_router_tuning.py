"""Router tuning on N ranks equals one rank. Only the chosen routers change, have moments and are reduced."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.names import DISPATCH_ROWS
from tests.support.cover import exhaustive, full
from tests.support.layouts import GROUPS, IMAGE, LAYERS, Layout
from tests.support.tuned import BATCH, Tuned, tune
from tests.support.tuning_samples import made_samples

LAYOUTS = [
    (Layout(2, 1, "pinned", tuned=(1,)), 1),  # test_choices_on_n_ranks_equal_one has FSDP2
    full(Layout(4, 1, "uneven", "fsdp2", "block", tuned=(1,)), None),
    full(Layout(2, 2, "interleaved", "ddp", "experts", tuned=(0, 1)), 1),
    exhaustive(Layout(2, 2, "pinned", "fsdp2", tuned=(0,)), None),
    full(Layout(1, 2, data="fsdp2", recompute="block", tuned=(0, 1)), None),
]
CHOICE_LAYOUTS = [
    Layout(2, 1, "pinned", "fsdp2", tuned=(0, 1)),
    exhaustive(Layout(2, 1, "pinned", tuned=(0, 1))),
    full(Layout(2, 2, "pinned", "fsdp2", "block", tuned=(0, 1))),
    full(Layout(4, 1, "uneven", recompute="experts", tuned=(0, 1))),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = sum(group.num_columns for group in GROUPS)
    out = tmp_path_factory.mktemp("samples") / "made"
    return made_samples(out, ids=(0, IMAGE[1]), layers=range(LAYERS), columns=columns, model={}, longest=8)


@pytest.fixture(scope="module")
def oracle(
    run_in_world: Callable[..., list[Any]], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Layout, int | None], tuple[Tuned, Path]]:
    """Returns a function that trains in one process and returns the outcome and the checkpoint of the initial weights."""
    start = tmp_path_factory.mktemp("start")
    known: dict[tuple[Any, ...], tuple[Tuned, Path]] = {}

    def found(layout: Layout, refresh_every: int | None) -> tuple[Tuned, Path]:
        key = (layout.tuned, refresh_every)
        if key not in known:
            own = start / "-".join(map(str, layout.tuned))
            known[key] = run_in_world(1, tune, Layout(tuned=layout.tuned), folder, own, refresh_every)[0], own
        return known[key]

    return found


@pytest.fixture(scope="module")
def choice_oracle(
    run_in_world: Callable[..., list[Any]], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tuned, Path]:
    start = tmp_path_factory.mktemp("choices")
    return run_in_world(1, tune, Layout(tuned=(0, 1)), folder, start, None, "choices")[0], start


@pytest.mark.parametrize(("layout", "refresh_every"), LAYOUTS, ids=str)
def test_n_ranks_equal_one(
    run_in_world: Callable[..., list[Any]],
    folder: Path,
    oracle: Callable[..., tuple[Tuned, Path]],
    layout: Layout,
    refresh_every: int | None,
) -> None:
    one, start = oracle(layout, refresh_every)
    outcomes: list[Tuned] = run_in_world(layout.world_size, tune, layout, folder, start, refresh_every)
    chosen = {
        name for name in one.before if name.startswith(tuple(f"layers.{layer}.moe.router." for layer in layout.tuned))
    }
    assert len(chosen) == 4 * len(layout.tuned)  # router weights and null weights of two groups
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, one.steps, strict=True):
            assert step.auxiliary > 0.01
            np.testing.assert_allclose(step.nll_M, expected.nll_M, rtol=1e-9)
            np.testing.assert_allclose(
                [step.auxiliary, step.grad_norm], [expected.auxiliary, expected.grad_norm], rtol=1e-9
            )
        assert outcome.gradients.keys() == one.gradients.keys() == outcome.moments == chosen
        for name in chosen:
            np.testing.assert_allclose(outcome.gradients[name], one.gradients[name], rtol=0, atol=1e-9, err_msg=name)
            np.testing.assert_allclose(outcome.parameters[name], one.parameters[name], rtol=0, atol=1e-9, err_msg=name)
        for name in sorted(chosen - {n for n in chosen if n.endswith("null")}):
            assert np.abs(outcome.gradients[name]).max() > 1e-6, name
            assert not np.array_equal(outcome.parameters[name], outcome.before[name]), name
        for name in outcome.parameters.keys() - chosen:
            np.testing.assert_array_equal(outcome.parameters[name], outcome.before[name], err_msg=name)
        assert outcome.events == outcomes[0].events, "the recorded order of collectives differs between ranks"
    backward = sum("backward" in event for event in outcomes[0].events)
    forward = sum(event.endswith(DISPATCH_ROWS) for event in outcomes[0].events)
    if layout.recompute != "block" and refresh_every is None and layout.ep > 1:
        lowest = min(layout.tuned)
        assert backward == 3 * forward * (LAYERS - lowest) / LAYERS, "backward ends at the lowest chosen layer"


def test_a_refresh_changes_the_targets(oracle: Callable[..., tuple[Tuned, Path]]) -> None:
    frozen, _ = oracle(Layout(tuned=(0, 1)), None)
    fresh, _ = oracle(Layout(tuned=(0, 1)), 1)
    assert frozen.steps[0].auxiliary == fresh.steps[0].auxiliary
    assert frozen.steps[1].auxiliary != fresh.steps[1].auxiliary


@pytest.mark.parametrize("layout", CHOICE_LAYOUTS, ids=str)
def test_choices_on_n_ranks_equal_one(
    run_in_world: Callable[..., list[Any]], folder: Path, choice_oracle: tuple[Tuned, Path], layout: Layout
) -> None:
    one, start = choice_oracle
    outcomes: list[Tuned] = run_in_world(layout.world_size, tune, layout, folder, start, None, "choices")
    assert 0 < one.steps[0].labels_M.sum() < BATCH, "a label for each sample whose choices are told apart"
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, one.steps, strict=True):
            np.testing.assert_array_equal(step.labels_M, expected.labels_M)
            np.testing.assert_allclose(
                [*step.nll_M, step.auxiliary, step.grad_norm],
                [*expected.nll_M, expected.auxiliary, expected.grad_norm],
                rtol=1e-9,
            )
        assert outcome.gradients.keys() == one.gradients.keys() == outcome.moments
        assert all(".moe.router." in name for name in outcome.moments)
        torch.testing.assert_close(outcome.gradients, one.gradients, rtol=0, atol=1e-9)
        for name in one.gradients:
            np.testing.assert_allclose(outcome.parameters[name], one.parameters[name], rtol=0, atol=1e-9, err_msg=name)
        for name in outcome.parameters.keys() - one.gradients.keys():
            np.testing.assert_array_equal(outcome.parameters[name], outcome.before[name], err_msg=name)
