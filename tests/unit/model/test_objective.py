"""The cross entropy over choices has the same values and gradients as a slow reference."""

import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED
from moe_dist.model.objective import Choices
from tests.reference.choices import choice_loss_reference

B, S, D, V = 4, 3, 5, 9
CHOICES = [[3, 1, 8, 0], [7, 2, -1, -1], [4, -1, -1, -1], [-1] * 4]  # the last sample has no choice
LABELS = [[IGNORED, 3, 3], [7, IGNORED, IGNORED], [IGNORED, IGNORED, 4], [IGNORED] * 3]


def made(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((B, S, D), (V, D)))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def losses(x: Tensor, weight: Tensor) -> Tensor:
    return Choices(torch.tensor(CHOICES)).losses(x, weight, torch.tensor(LABELS))


def test_it_is_the_reference_at_labels_and_nothing_elsewhere() -> None:
    x, weight = made(torch.float64)
    found = losses(x, weight)
    wanted = torch.zeros(B, S, dtype=torch.float64)
    for b, labels in enumerate(LABELS):
        for s, label in enumerate(labels):
            if label != IGNORED:
                wanted[b, s] = choice_loss_reference(x[b, s], weight, [c for c in CHOICES[b] if c >= 0])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    assert found[2, 2] == 0.0, "one choice alone is certain"
    scale = torch.rand(B, S, dtype=torch.float64)
    ours = torch.autograd.grad((scale * found).sum(), [x, weight])
    theirs = torch.autograd.grad((scale * wanted).sum(), [x, weight])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
    assert ours[0][3].abs().max() == 0.0, "a sequence without choices has no gradient, and no NaN"


@pytest.mark.parametrize("large", [1.0, 1e4])
def test_losses_of_bf16_are_fp32_and_finite(large: float) -> None:
    x, weight = made(torch.bfloat16)
    found = losses(large * x, weight)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    (gradient,) = torch.autograd.grad(found.sum(), [x])
    assert gradient.isfinite().all()
