"""DeepEP's index format numbers the slots of all ranks, and uses -1 for no selection. HybridEP's format is a boolean map
over these slots, in which a null choice sets no entry."""

import torch

from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.deep_ep_v2 import topk_idx_of
from moe_dist.moe.dispatch.hybrid_ep import routing_map_of
from moe_dist.moe.dispatch.kernels import SlotNumbers
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.messages import refused

TEXT, IMAGE = ExpertGroup("text", 3, 1, 2, 4, 0, ("text",)), ExpertGroup("image", 2, 1, 2, 4, 3, ("image",))


def test_ranks_with_different_numbers_of_slots_get_phantom_numbers() -> None:
    placement = ExpertPlacement((TEXT, IMAGE), ((0, 2, 4), (), (1, 3)))
    numbers = SlotNumbers.of(placement)
    assert numbers.slots_per_rank == 3
    assert numbers.number_of_expert == (0, 6, 1, 7, 2)  # slot numbers of experts 0 to 4
    wider = SlotNumbers.of(placement, multiple=4)
    assert (wider.slots_per_rank, wider.number_of_expert) == (4, (0, 8, 1, 9, 2))
    assert SlotNumbers.of(ExpertPlacement((TEXT, IMAGE), ((0, 1, 2, 3), (4,))), multiple=4).slots_per_rank == 4


def test_topk_idx_is_int64_with_minus_one_for_no_selection() -> None:
    numbers = torch.tensor([0, 6, 1, 7, 2])
    token_N = torch.arange(3).repeat_interleave(2)
    assignments = Assignments(token_N, torch.tensor([4, -1, -1, -1, 1, 0]), torch.ones(6))
    topk_idx = topk_idx_of(assignments, 3, 2, numbers)
    assert topk_idx.dtype == torch.int64
    assert topk_idx.is_contiguous()
    assert topk_idx.tolist() == [[2, -1], [-1, -1], [6, 0]]
    assert topk_idx_of(Assignments(token_N[:0], token_N[:0], torch.ones(0)), 0, 2, numbers).shape == (0, 2)


def test_assignments_by_expert_are_refused() -> None:
    assignments = Assignments(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), torch.ones(3))
    with refused(ConfigError):
        topk_idx_of(assignments, 2, 2, torch.arange(4))
    shuffled = Assignments(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), torch.ones(4))
    with refused(RuntimeError):
        topk_idx_of(shuffled, 2, 2, torch.arange(4))


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
