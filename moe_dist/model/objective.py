"""Losses that a forward computes for its labels instead of the cross entropy over all words.

Shape letters: B sequences, S positions, D hidden size, V words of the vocabulary, K choices of a sequence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """Computes a loss for each label, inside forward, because FSDP2 gathers the output weight only there."""

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the losses [..., B, S] from normed hidden states and the output weight; 0 where the label is negative."""
        ...


@dataclass(frozen=True)
class Choices:
    """Cross entropy over the words of a sequence's choices alone: log(sum over choices c of exp(z_c)) - z_0, where z_c is
    the logit of choice c, and choice 0 is the right one. The label's id does not matter. `choice_BK` has the different
    words of each sequence, int64; -1 for missing choices, which come last."""

    choice_BK: Tensor

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the losses [B, S] in fp32 (float64 for a float64 model). Computes B x S x K logits, and not B x S x V."""
        weight_BKD = weight_VD[self.choice_BK.clamp_min(0)].to(x_BSD.dtype)
        logits_BSK = x_BSD @ weight_BKD.transpose(1, 2)
        logits_BSK = logits_BSK.to(torch.promote_types(logits_BSK.dtype, torch.float32))
        # the smallest number, because -inf would give a sequence without choices NaN gradients
        logits_BSK = logits_BSK.masked_fill((self.choice_BK < 0)[:, None], torch.finfo(logits_BSK.dtype).min)
        return torch.where(labels_BS < 0, 0.0, logits_BSK.logsumexp(-1) - logits_BSK[..., 0])
