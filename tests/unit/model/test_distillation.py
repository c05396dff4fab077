"""The KL from a teacher has the same values and gradients as a slow reference. The KL replaces a share of the loss."""

import math

import pytest
import torch
from torch import Tensor

from moe_dist.data.batch import IGNORED
from moe_dist.model.objective import Divergence, TeacherOutput, divergences
from moe_dist.train.objective.distillation import Distillation
from moe_dist.train.objective.loss import MicroLoss

B, S, V = 2, 3, 11


def reference(logits: Tensor, teacher: Tensor, labels: Tensor, divergence: Divergence) -> Tensor:
    """Computes the KL word by word in Python."""
    rows = []
    for b in range(B):
        for s in range(S):
            q, p = (each[b, s].softmax(-1) for each in (logits, teacher))
            pairs = [(p[v], q[v]) for v in range(V)]
            if divergence == "reverse":
                pairs = [(q_v, p_v) for p_v, q_v in pairs]
            kl = sum(p_v * (p_v.log() - q_v.log()) for p_v, q_v in pairs)
            rows.append(kl if labels[b, s] >= 0 else 0.0 * q.sum())
    return torch.stack(rows).view(B, S)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_values_and_gradients(divergence: Divergence) -> None:
    torch.manual_seed(0)
    logits = torch.randn(B, S, V, dtype=torch.float64, requires_grad=True)
    with_most_mass = 3 * torch.randn(B, S, V, dtype=torch.float64)
    labels = torch.tensor([[1, IGNORED, 3], [0, 2, IGNORED]])
    output = TeacherOutput(with_most_mass.log_softmax(-1), divergence)
    gradient = torch.randn(B, S, dtype=torch.float64)
    results = []
    for found in (divergences(logits, output, labels), reference(logits, with_most_mass, labels, divergence)):
        logits.grad = None
        (found * gradient).sum().backward()
        results.append((found.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)
    assert not results[0][0][labels < 0].any()
    assert not results[0][1][labels < 0].any()


def test_extremes_stay_finite() -> None:
    labels = torch.zeros(1, 1, dtype=torch.int64)
    sure = torch.full((1, 1, V), -200.0).index_fill(2, torch.tensor([2]), 200.0)  # all words but one have probability 0
    other = sure.flip(-1).requires_grad_()
    for output in (TeacherOutput(sure.log_softmax(-1)), TeacherOutput(sure.log_softmax(-1), divergence="reverse")):
        other.grad = None
        (kl,) = divergences(other, output, labels).flatten()
        kl.backward()
        assert math.isclose(float(kl.detach()), 400.0, rel_tol=1e-5)
        assert other.grad is not None
        assert other.grad.isfinite().all()


def test_the_kl_replaces_a_share_of_the_cross_entropy() -> None:
    """This micro-batch has three of the step's four labels."""
    losses_BS, kl_BS = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    none = torch.zeros(1, dtype=torch.float64)
    loss = MicroLoss(total=losses_BS.sum() / 4, nll_M=none, balance=none, z=none, auxiliary=none)
    found = Distillation(lambda _: TeacherOutput(losses_BS), weight=0.7).add(loss, losses_BS, kl_BS, torch.tensor(4))
    torch.testing.assert_close(found.total, torch.tensor(0.3 * 6.0 / 4 + 0.7 * 1.5 / 4))
    torch.testing.assert_close(found.auxiliary, torch.tensor([0.7 * 1.5 / 4], dtype=torch.float64))
