"""The ledger's closed forms equal counts over all choices."""

from itertools import combinations

import pytest

from moe_dist.moe.dispatch.ledger import compare
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

TEXT = ExpertGroup("text", 4, 4, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 0, 2, 8, 4, ("image",))
PLACEMENT = ExpertPlacement((TEXT, IMAGE), ((0, 1, 4), (2, 3, 5)))


def test_shares_of_choices_that_leave_the_rank() -> None:
    """Rank 0 holds half of each group's experts, so half of evenly spread choices go to other ranks.

    12 of the 30 choices of 10 text tokens, and all 8 choices of 4 image tokens, are true experts.
    """
    ledger = compare(
        PLACEMENT,
        0,
        SentCounts(rows_remote=9, pairs=20, pairs_remote=11, rows_padding=3),
        true_choices_G=[12, 8],
        null_choices_G=[18, 0],
        tokens_G=[10, 4],
    )
    assert ledger == {
        "rows_remote": 9,
        "pairs": 20,
        "pairs_remote": 11,
        "rows_per_pair": 11,
        "rows_topk": (30 + 8) / 2,
        "rows_same_active": (12 + 8) / 2,
        "rows_null_remapped": 11 + (30 - 12) / 2,
        "rows_bound": 10 + 4,
        "rows_padding": 3,
    }


@pytest.mark.parametrize("limit", [(1, 1), (4, 1), (4, 2), (2, 1)])
def test_the_bound_is_the_largest_number_of_rows_over_every_allowed_choice(limit: tuple[int, int]) -> None:
    """Some node groups are spread over two ranks, and one rank has no expert."""
    node_groups, topk = limit
    group = ExpertGroup("text", 8, 0, 3, 8, 0, ("text",), node_groups=node_groups, topk_node_groups=topk)
    placement = ExpertPlacement((group,), ((0, 1, 2), (3, 4), (5, 6, 7), ()))
    size = 8 // node_groups
    for rank in range(4):
        choices = [choice for count in (1, 2, 3) for choice in combinations(range(8), count)]  # others are null
        allowed = [choice for choice in choices if len({expert // size for expert in choice}) <= topk]
        rows = [len({placement.rank_of_expert[expert] for expert in choice} - {rank}) for choice in allowed]
        assert placement.most_rows(rank, group) == max(rows)


def test_without_a_choice_of_tokens_only_the_ranks_bound_the_rows() -> None:
    group = ExpertGroup("text", 8, 0, 1, 8, 0, ("text",), token_share=0.5)
    assert ExpertPlacement.interleaved((group,), 4).most_rows(0, group) == 3


def test_top_k_cannot_choose_more_experts_than_there_are() -> None:
    group = ExpertGroup("text", 2, 6, 5, 8, 0, ("text",))
    placement = ExpertPlacement((group,), ((0,), (1,)))
    ledger = compare(placement, 0, SentCounts(5, 10, 5), true_choices_G=[10], null_choices_G=[15], tokens_G=[10])
    assert ledger["rows_topk"] == pytest.approx(10.0)


def test_a_rank_without_experts_sends_every_choice() -> None:
    placement = ExpertPlacement((TEXT,), (tuple(range(4)), ()))
    ledger = compare(placement, 1, SentCounts(5, 7, 7), true_choices_G=[7], null_choices_G=[8], tokens_G=[5])
    assert ledger["rows_same_active"] == 7
    assert ledger["rows_topk"] == 15
