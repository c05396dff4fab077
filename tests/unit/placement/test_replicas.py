"""Tests which slot processes each rank's pairs, and the ranks' shares of load."""

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica

GROUPS = (ExpertGroup("text", 3, 1, 2, 8), ExpertGroup("image", 2, 1, 1, 12, first_expert=3))
SLOTS = ((1, 3), (0, 4), (2,), ())
REPLICAS = ((Replica(0, 0), Replica(1, 2), Replica(4, 0), Replica(4, 3)), ())
PLACED = PlacementWithReplicas(GROUPS, SLOTS, REPLICAS)


def test_by_hand() -> None:
    """Replicas are numbered in the order of their experts' slots. Expert 1 is on rank 0 and expert 0 is on rank 1, so
    the replica of expert 1 comes first."""
    one = PLACED.in_layer(0)
    assert one.slots == ((1, 3, 6, 7), (0, 4), (2, 5), (8,))
    assert [(group.name, group.num_experts, group.ffn_dim) for group in one.groups[2:]] == [
        ("text replicas", 2, 8),
        ("image replicas", 2, 12),
    ]
    assert [PLACED.id_of_expert(0, source) for source in range(4)] == [
        [6, 1, 2, 3, 7],  # rank 0 itself has slots of experts 0, 1 and 4
        [0, 5, 2, 3, 4],
        [6, 5, 2, 3, 7],  # rank 2 has no slot of expert 4, and uses the first replica of expert 4
        [0, 1, 2, 3, 8],
    ]
    assert PLACED.id_of_expert(1, 0) == [0, 1, 2, 3, 4]
    assert PLACED.in_layer(1).slots == SLOTS


def test_shares_are_those_of_drawn_tokens() -> None:
    """A rank's expected load agrees with a count of drawn pairs. The pairs of each source rank are drawn separately."""
    rng, share_E = np.random.default_rng(0), np.array([0.4, 0.2, 0.1, 0.1, 0.2])
    pairs_RE = rng.multinomial(100_000, share_E, size=4)
    rank_of = np.array(PLACED.in_layer(0).rank_of_expert)
    counted_R = np.zeros(4)
    for source, pairs_E in enumerate(pairs_RE):
        np.add.at(counted_R, rank_of[PLACED.id_of_expert(0, source)], pairs_E)
    pairs_LE = np.stack([pairs_RE.sum(0)] * 2)
    expected_LR = PLACED.by_rank(pairs_LE)
    np.testing.assert_allclose(expected_LR[0], counted_R, rtol=0.01)
    assert expected_LR[1].tolist() == ExpertPlacement(GROUPS, SLOTS).by_rank(pairs_LE)[1].tolist()


@pytest.mark.parametrize(
    "replicas",
    [(Replica(1, 2), Replica(0, 0)), (Replica(1, 0),), (Replica(0, 4),), (Replica(5, 0),), (Replica(0, 0), Replica(0, 0))],
    ids=["unsorted", "own rank", "no rank", "no expert", "twice"],
)
def test_other_replicas_are_refused(replicas: tuple[Replica, ...]) -> None:
    with pytest.raises(ConfigError, match="replicas of layer 0"):
        PlacementWithReplicas(GROUPS, SLOTS, (replicas,))
