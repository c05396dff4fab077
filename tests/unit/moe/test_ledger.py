"""The ledger's closed forms against a count over every choice."""

import pytest

from moe_dist.moe.ledger import compare
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

TEXT = ExpertGroup("text", 4, 4, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 0, 2, 8, 4, ("image",))
PLACEMENT = ExpertPlacement((TEXT, IMAGE), ((0, 1, 4), (2, 3, 5)))


def test_shares_of_choices_that_leave_the_rank() -> None:
    """Rank 0 holds half of each group's experts, so half of evenly spread choices leave it.

    10 text tokens took 12 true experts of 30 choices, 4 image tokens 8 of 8.
    """
    ledger = compare(
        PLACEMENT,
        0,
        true_choices_G=[12, 8],
        null_choices_G=[18, 0],
        tokens_G=[10, 4],
        rows_remote=9,
        pairs=20,
        pairs_remote=11,
    )
    assert ledger == {
        "rows_remote": 9,
        "pairs": 20,
        "pairs_remote": 11,
        "rows_per_pair": 11,
        "rows_topk": (30 + 8) / 2,
        "rows_same_active": (12 + 8) / 2,
        "rows_null_remapped": 11 + (30 - 12) / 2,
    }


def test_top_k_cannot_choose_more_experts_than_there_are() -> None:
    group = ExpertGroup("text", 2, 6, 5, 8, 0, ("text",))
    placement = ExpertPlacement((group,), ((0,), (1,)))
    ledger = compare(
        placement, 0, true_choices_G=[10], null_choices_G=[15], tokens_G=[10], rows_remote=5, pairs=10, pairs_remote=5
    )
    assert ledger["rows_topk"] == pytest.approx(10.0)


def test_a_rank_without_experts_sends_every_choice() -> None:
    placement = ExpertPlacement((TEXT,), (tuple(range(4)), ()))
    ledger = compare(
        placement, 1, true_choices_G=[7], null_choices_G=[8], tokens_G=[5], rows_remote=5, pairs=7, pairs_remote=7
    )
    assert ledger["rows_same_active"] == 7
    assert ledger["rows_topk"] == 15
