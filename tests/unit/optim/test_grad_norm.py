import torch
from torch import nn

from moe_dist.optim.optimizer import clip_by_norm, local_norm_squared

CPU = torch.device("cpu")


def with_gradient(gradient: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    return parameter


def test_replicas_count_once_over_all_ranks() -> None:
    torch.manual_seed(0)
    dense = with_gradient(torch.randn(5, 3))
    shards = [with_gradient(torch.randn(2, 3)) for _ in range(4)]
    contributions = [local_norm_squared([(dense, 4), (shard, 1)], device=CPU) for shard in shards]
    whole = torch.cat([dense.grad.flatten(), *(shard.grad.flatten() for shard in shards)])  # type: ignore[union-attr]
    assert contributions[0].dtype == torch.float64
    torch.testing.assert_close(sum(contributions), whole.double().square().sum(), rtol=1e-6, atol=0)


def test_float64_stays_exact_and_bf16_is_summed_in_fp32() -> None:
    exact = with_gradient(torch.randn(1000, dtype=torch.float64))
    torch.testing.assert_close(
        local_norm_squared([(exact, 1)], device=CPU),
        exact.grad.square().sum(),
        rtol=1e-14,
        atol=0,  # type: ignore[union-attr]
    )
    coarse = with_gradient(torch.full((4097,), 1.0, dtype=torch.bfloat16))  # bf16 can represent neither 4097 nor its root
    torch.testing.assert_close(
        local_norm_squared([(coarse, 1)], device=CPU), torch.tensor(4097.0, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_clip_leaves_small_gradients_and_scales_large_ones() -> None:
    small, large, none = (with_gradient(torch.tensor([3.0, 4.0]) * factor) for factor in (0.1, 1.0, 0.0))
    for parameter in (small, large, none):
        norm = local_norm_squared([(parameter, 1)], device=CPU).sqrt()
        clip_by_norm([parameter], norm, 1.0)
    torch.testing.assert_close(small.grad, torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(none.grad, torch.zeros(2))
