"""Tests which slot serves each rank's pairs, and the ranks' shares of load."""

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica

GROUPS = (ExpertGroup("text", 3, 1, 2, 8), ExpertGroup("image", 2, 1, 1, 12, first_expert=3))
SLOTS = ((1, 3), (0, 4), (2,), ())
REPLICAS = ((Replica(0, 0), Replica(1, 2), Replica(4, 0), Replica(4, 3)), ())
PLACED = PlacementWithReplicas(GROUPS, SLOTS, REPLICAS)
# The rank that computes each expert for the tokens of each rank: itself if it has a slot, else the expert's ranks in turn.
SERVERS = [[0, 0, 2, 0, 0], [1, 2, 2, 0, 1], [0, 2, 2, 0, 0], [1, 0, 2, 0, 3]]


def test_shares_are_those_of_drawn_tokens() -> None:
    """A rank's expected load agrees with a count of drawn pairs. The pairs of each source rank are drawn separately."""
    rng, share_E = np.random.default_rng(0), np.array([0.4, 0.2, 0.1, 0.1, 0.2])
    pairs_RE = rng.multinomial(100_000, share_E, size=4)
    rank_RE, counted_R = np.array(SERVERS), np.zeros(4)
    np.testing.assert_array_equal(PLACED.computing_ranks(0), rank_RE)
    np.add.at(counted_R, rank_RE, pairs_RE)
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
