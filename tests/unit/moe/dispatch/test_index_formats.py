"""DeepEP's index format numbers the slots of all ranks, and uses -1 for no selection."""

import torch

from moe_dist.errors import ConfigError
from moe_dist.moe.dispatch.deep_ep_v2 import SlotNumbers, topk_idx_of
from moe_dist.moe.routing.types import Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.messages import refused

TEXT, IMAGE = ExpertGroup("text", 3, 1, 2, 4, 0, ("text",)), ExpertGroup("image", 2, 1, 2, 4, 3, ("image",))


def test_ranks_with_different_numbers_of_slots_get_phantom_numbers() -> None:
    placement = ExpertPlacement((TEXT, IMAGE), ((0, 2, 4), (), (1, 3)))
    numbers = SlotNumbers.of(placement)
    assert numbers.slots_per_rank == 3
    assert numbers.number_of_expert == (0, 6, 1, 7, 2)  # slot numbers of experts 0 to 4
    assert SlotNumbers.of(ExpertPlacement((TEXT, IMAGE), ((0, 1, 2, 3), (4,)))).slots_per_rank == 4


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
