"""bf16 copies of expert weights are made once per training step. Values and gradients are the same as with a conversion
in each forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.experts.experts import ExpertStack, Runs
from moe_dist.moe.experts.products import ExpertGemm

RUNS = Runs((3, 0, 2))


def stack(gemm: ExpertGemm = "loop") -> ExpertStack:
    made = ExpertStack(8, 16, RUNS.num_experts, gemm=gemm)
    generator = torch.Generator().manual_seed(0)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, generator=generator)
    return made


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects the fp32 stacks that are converted to bf16."""
    seen, copy = [], Tensor.copy_

    def copy_(self: Tensor, source: Tensor, *args: Any) -> Tensor:
        if source.dim() == 3 and (self.dtype, source.dtype) == (torch.bfloat16, torch.float32):
            seen.append(source)
        return copy(self, source, *args)

    monkeypatch.setattr(Tensor, "copy_", copy_)
    return seen


@pytest.mark.parametrize("fused", [True, False])
def test_values_and_gradients_over_steps(casts: list[Tensor], fused: bool) -> None:
    """Copies must be correct with a fused optimizer too, which does not raise the versions of the tensors that it
    changes."""
    made, plain = stack(), stack()  # `plain` converts its weights in each forward
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1, fused=fused) for each in (made, plain)]
    for step in range(3):
        made.keep_copies(True)
        for micro_batch in range(3):
            x_QD = torch.randn(5, 8, generator=torch.Generator().manual_seed(3 * step + micro_batch)).to(torch.bfloat16)
            ours, theirs = made(x_QD, RUNS), plain(x_QD, RUNS)
            assert torch.equal(ours, theirs)
            ours.float().sum().backward()
            theirs.float().sum().backward()
            for found, wanted in zip(made.parameters(), plain.parameters(), strict=True):
                assert found.grad.dtype == torch.float32
                assert torch.equal(found.grad, wanted.grad)  # pyright: ignore[reportArgumentType]
        made.keep_copies(False)
        assert len(casts) == 3 * (step + 1)  # gate, up and down are converted once per step of three forwards
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_changed_weight_is_converted_again_where_no_copies_are_kept(casts: list[Tensor]) -> None:
    made, other = stack(), stack()
    x_QD = torch.randn(5, 8).to(torch.bfloat16)
    with torch.no_grad():
        before = made(x_QD, RUNS)
        other.gate.mul_(2.0)
        made.load_state_dict(other.state_dict())
        after = made(x_QD, RUNS)
    assert not torch.equal(before, after)
    assert torch.equal(after, other(x_QD, RUNS))
    assert not casts
