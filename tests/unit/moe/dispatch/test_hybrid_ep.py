"""HybridEP's index format is a boolean map over the slots of all ranks. A null choice sets no entry."""

import torch

from moe_dist.moe.dispatch.hybrid_ep import routing_map_of
from moe_dist.moe.routing.types import Assignments


def test_the_map_leaves_no_mark_for_an_absent_pair() -> None:
    # Experts 0, 1 and 2 are in slots 2, 0 and 3 of four.
    token_N, expert_N = torch.arange(3).repeat_interleave(2), torch.tensor([0, -1, -1, -1, 1, 2])
    routing_map, cell_N = routing_map_of(Assignments(token_N, expert_N, torch.ones(6)), 3, torch.tensor([2, 0, 3]), 4)
    assert routing_map.dtype == torch.bool
    assert routing_map.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert cell_N.tolist() == [2, 12, 12, 12, 8, 11]


def test_pairs_may_come_by_expert_and_there_may_be_none() -> None:
    assignments = Assignments(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), torch.ones(3))
    routing_map, _ = routing_map_of(assignments, 2, torch.tensor([0, 3]), 4)
    assert routing_map.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 1]]
    nothing = Assignments(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.ones(0))
    assert routing_map_of(nothing, 0, torch.tensor([0]), 4)[0].shape == (0, 4)
