"""Tests which loads are kept for the next step's balance loss, that the loss equals the loss of a slow loop, and that a
damaged state is refused."""

from typing import Any

import pytest
import torch

from moe_dist.errors import DataError
from moe_dist.moe.losses import ColumnTables, StepLoad, balance_terms
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.placement.placement import ExpertGroup
from tests.support.counts import counts_with

TEXT = ExpertGroup("text", 2, 1, 2, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 0, 1, 8, 2, ("image",))
GROUPS = (TEXT, IMAGE)
CPU = torch.device("cpu")


def counts_of(choices: list[list[float]], tokens: list[list[float]]) -> RoutingCounts[Any]:
    return counts_with(
        choices_LC=torch.tensor(choices, dtype=torch.float64), tokens_LG=torch.tensor(tokens, dtype=torch.float64)
    )


def load_of(choices: list[list[float]], tokens: list[list[float]]) -> StepLoad:
    load = StepLoad(GROUPS, len(tokens), CPU)
    load.after_step(counts_of(choices, tokens))
    return load


def test_a_group_without_tokens_keeps_its_loads() -> None:
    load = load_of([[3, 1, 5, 2, 4], [1, 2, 0, 0, 5]], [[4, 7], [4, 0]])
    load.after_step(counts_of([[0, 0, 1, 2, 0], [2, 0, 0, 1, 0]], [[0, 3], [1, 1]]))
    assert load.choices_LC.tolist() == [[3, 1, 1, 2, 4], [2, 0, 0, 1, 0]]
    assert load.tokens_LG.tolist() == [[4, 3], [1, 1]]


def test_the_loss_is_the_loads_times_the_probabilities_of_the_step() -> None:
    """The loss is summed over micro-batches with unequal numbers of tokens."""
    torch.manual_seed(0)
    load, tables = load_of([[3, 1, 5, 2, 4]], [[4, 7]]), ColumnTables.on(GROUPS, CPU)
    tokens_I, probabilities_I = [[3, 1], [0, 2], [2, 0]], []
    total = 0.0
    for tokens in tokens_I:
        prob_C = torch.cat([torch.rand(n, w, dtype=torch.float64).sum(0) for n, w in zip(tokens, (3, 2), strict=True)])
        prob_C = torch.stack([prob_C[0], prob_C[1], prob_C[3], prob_C[4], prob_C[2]])  # true columns first
        probabilities_I.append(prob_C)
        terms_LG = balance_terms(
            prob_C[None], load.choices_LC, torch.tensor([tokens]), tables, kind="vanilla", load_tokens_LG=load.tokens_LG
        )
        shares_G = torch.tensor(tokens, dtype=torch.float64) / torch.tensor([5.0, 3.0])
        total += float((terms_LG * shares_G).sum())
    P_C = sum(probabilities_I)
    expected = 0.0
    for columns, size, made, seen in (((0, 1, 4), 3, 4, 5), ((2, 3), 2, 7, 3)):
        for column in columns:
            expected += size * float(load.choices_LC[0, column]) / made * float(P_C[column]) / seen
    assert total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"choices": [[3, 1, 5, 2, 4]]},
        {"choices": [[3, 1, 5, 2]], "tokens": [[4, 7]]},
        {"choices": [[3, 1, 5, 2, "4"]], "tokens": [[4, 7]]},
        {"choices": [[3, 1, 5, 2, -4]], "tokens": [[4, 7]]},
        {"choices": [[3, 1, 5, 2, 10**400]], "tokens": [[4, 7]]},
        {"choices": [[3, 1, 5, 2, float("nan")]], "tokens": [[4, 7]]},
    ],
)
def test_a_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(DataError, match=r"state of the balance loss: (choices|tokens)="):
        StepLoad(GROUPS, 1, CPU).restore(state)
