"""Orders by counting, held to a stable sort."""

import pytest
import torch

from moe_dist.moe.counting import counting_order, runs_in_order


@pytest.mark.parametrize("num_keys", [1, 9, 256, 257, 30_000, 40_000])
@pytest.mark.parametrize("count", [0, 1, 3_000])
def test_counting_order_is_a_stable_sort(num_keys: int, count: int) -> None:
    key_N = torch.randint(0, num_keys, (count,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counting_order(key_N, num_keys), torch.sort(key_N, stable=True).indices)


def test_runs_drawn_by_hand() -> None:
    starts, lengths = torch.tensor([7, 0, 3]), torch.tensor([2, 0, 3])
    assert runs_in_order(starts, lengths, 5).tolist() == [7, 8, 3, 4, 5]
