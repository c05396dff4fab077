"""Slow reference of the cross entropy over a sample's choices. It computes each logit from the formula."""

import math
from collections.abc import Sequence

from torch import Tensor


def choice_loss_reference(h_D: Tensor, weight_VD: Tensor, choices: Sequence[int]) -> Tensor:
    """Returns -log(exp(z_0) / sum over choices of exp(z_c)), where z_c = h w_c. The first choice is the right answer."""
    logits = [sum(h_D[d] * weight_VD[c, d] for d in range(len(h_D))) for c in choices]
    top = max(float(each.detach()) for each in logits)  # pyright: ignore
    shares = [(each - top).exp() for each in logits]  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    total = sum(shares)
    loss = -(shares[0] / total).log()  # pyright: ignore[reportAttributeAccessIssue]
    assert math.isfinite(float(loss.detach()))
    return loss
