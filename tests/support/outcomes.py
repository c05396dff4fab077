"""Compares the outcomes of a layout's ranks with the outcome of one rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.agreement import Arrays, merged
from tests.support.layouts import Layout, Outcome, train

# Fields of a layout that change the results of the computation, and not only its distribution over ranks.
OF_THE_MODEL = (
    "free", "null_logit", "balance_loss", "balance_scope", "null_weight", "tied", "optimizer", "distilled", "form"
)  # fmt: skip


def merged_outcomes(outcomes: list[Outcome], field: str) -> Arrays:
    """Returns the tensors of all ranks under logical names. Copies must be bit-equal."""
    return merged([getattr(each, field) for each in outcomes])


def assert_same_tensors(outcomes: list[Outcome], one_rank: Outcome) -> None:
    """Compares gradients and parameters in float64."""
    for field in ("gradients", "parameters"):
        got, expected = merged_outcomes(outcomes, field), getattr(one_rank, field)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9, msg=lambda text, field=field: f"{field}: {text}")


def assert_equal_one_rank(run_in_world: Callable[..., list[Any]], layout: Layout, start: Path) -> Outcome:
    """Trains a layout, and the same model on one rank from the same weights. Compares choices, losses, gradient norms,
    tensors and logits, and requires the same order of exchanges on all ranks. Returns the outcome of one rank.

    Args:
        start: An empty folder for the initial weights.
    """
    alone = Layout(**{name: getattr(layout, name) for name in OF_THE_MODEL})
    one_rank: Outcome = run_in_world(1, train, alone, start)[0]
    outcomes: list[Outcome] = run_in_world(layout.world_size, train, layout, start)
    for outcome in outcomes:
        for step, expected in zip(outcome.steps, one_rank.steps, strict=True):
            np.testing.assert_array_equal(step.counts.choices_LC, expected.counts.choices_LC)
            assert step.ledger["pairs"] == expected.ledger["pairs"]
            np.testing.assert_allclose(
                [step.grad_norm, step.balance, step.z, step.auxiliary, *step.nll_M],
                [expected.grad_norm, expected.balance, expected.z, expected.auxiliary, *expected.nll_M],
                rtol=1e-9,
            )
        assert outcome.events == outcomes[0].events, "the recorded order of collectives differs between ranks"
    assert_same_tensors(outcomes, one_rank)
    logits = np.concatenate([outcome.logits for outcome in outcomes])
    np.testing.assert_allclose(logits, one_rank.logits, rtol=0, atol=1e-9)
    return one_rank
