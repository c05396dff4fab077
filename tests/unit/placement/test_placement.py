"""Tests the rank and slot of each expert in a placement, and refused placements."""

import pytest

from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

GROUPS = (ExpertGroup("text", 3, 1, 2, 8, 0, ("text",)), ExpertGroup("image", 2, 0, 1, 8, 3, ("image",)))


def test_ranks_and_slots() -> None:
    #  rank 0: text/0 image/1   rank 1: none   rank 2: text/1 text/2 image/0
    placement = ExpertPlacement(GROUPS, ((0, 4), (), (1, 2, 3)))
    assert placement.rank_of_expert == (0, 2, 2, 2, 0)
    assert placement.slot_of_expert == (0, 0, 1, 2, 1)
    assert placement.local_experts(2, GROUPS[0]) == (1, 2)
    assert placement.local_experts(1, GROUPS[1]) == ()
    assert [placement.name_of(expert) for expert in range(5)] == ["text/0", "text/1", "text/2", "image/0", "image/1"]


def test_all_columns_share_the_choices_of_uniform_routing() -> None:
    group = ExpertGroup("text", 6, num_null=1, top_k=2, ffn_dim=8, num_identity=2, num_constant=3)
    assert group.num_columns == 12
    assert group.expected_experts_per_token == 1.0


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        (((0, 1), (2, 3)), "without one: \\['image/1'\\]"),
        (((0, 1, 2), (2, 3, 4)), "with several: \\['text/2'\\]"),
        (((1, 0), (2, 3, 4)), "sorted"),
    ],
)
def test_refused(slots: tuple[tuple[int, ...], ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExpertPlacement(GROUPS, slots)
