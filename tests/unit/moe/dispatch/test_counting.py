"""Counting sorts of the dispatch plan equal a stable sort."""

import pytest
import torch

from moe_dist.moe.kernels.torch_kernels import counting_order


@pytest.mark.parametrize("num_keys", [1, 9, 256, 257, 30_000, 32_768, 32_769, 40_000, 1 << 31])
@pytest.mark.parametrize("count", [0, 1, 3_000])
def test_counting_order_is_a_stable_sort(num_keys: int, count: int) -> None:
    key_N = torch.randint(0, num_keys, (count,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(counting_order(key_N, num_keys), torch.sort(key_N, stable=True).indices)
