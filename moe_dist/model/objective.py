"""Defines losses that forward computes for its labels instead of the cross entropy over all words.

Shape letters: B sequences, S positions, D hidden size, V words of the vocabulary, K choices of a sequence.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """Computes a loss for each label. It runs inside forward, because FSDP2 gathers the output weight only there."""

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the losses [..., B, S] from normed hidden states and the output weight; 0 where the label is negative."""
        ...


@dataclass(frozen=True)
class Choices:
    """Cross entropy over a few words of each sequence, its choices: log(sum over choices c of exp(z_c)) - z_0. z_c is the
    logit of choice c, and choice 0 is correct. The label's id does not matter. `choice_BK` (int64) has the choices of each
    sequence, all different, then -1 for missing choices."""

    choice_BK: Tensor

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the losses [B, S] in fp32 (float64 for a float64 model). Computes only B x S x K logits."""
        weight_BKD = weight_VD[self.choice_BK.clamp_min(0)].to(x_BSD.dtype)
        return self._losses(x_BSD @ weight_BKD.transpose(1, 2), labels_BS)

    def losses_of(self, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns the same losses from the logits of all words."""
        word_BSK = self.choice_BK.clamp_min(0)[:, None].expand(-1, logits_BSV.shape[1], -1)
        return self._losses(logits_BSV.gather(2, word_BSK), labels_BS)

    def _losses(self, logits_BSK: Tensor, labels_BS: Tensor) -> Tensor:
        logits_BSK = logits_BSK.to(torch.promote_types(logits_BSK.dtype, torch.float32))
        # the smallest finite number, because -inf would give NaN gradients to a sequence without choices
        logits_BSK = logits_BSK.masked_fill((self.choice_BK < 0)[:, None], torch.finfo(logits_BSK.dtype).min)
        return torch.where(labels_BS < 0, 0.0, logits_BSK.logsumexp(-1) - logits_BSK[..., 0])
