"""Defines losses that can replace the cross entropy over all words in a model's forward.

Shape letters: B sequences, S positions, D hidden size, V words of the vocabulary, K choices of a
sequence or words per token.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.model.layers import token_losses


class Objective(Protocol):
    """Computes a loss for each label. It is computed inside forward, because FSDP2 gathers the output weight only there."""

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


Divergence = Literal["forward", "reverse"]


@dataclass(frozen=True)
class TeacherOutput:
    """Distillation: the teacher's log-probabilities of the next token, for all words, without a gradient. The loss is the
    divergence between the model's and the teacher's distributions (Hinton et al., arXiv 1503.02531, at temperature 1).

        forward KL = sum over words v of p_v (log p_v - log q_v)        p: teacher, q: model
        reverse KL = sum over words v of q_v (log q_v - log p_v)
    """

    log_prob_BSV: Tensor  # fp32 (float64 for a float64 model)
    divergence: Divergence = "forward"

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns cross entropies and divergences [2, B, S]; see `Objective`."""
        logits_BSV = F.linear(x_BSD, weight_VD.to(x_BSD.dtype))
        return torch.stack([token_losses(logits_BSV, labels_BS), divergences(logits_BSV, self, labels_BS)])


def divergences(logits_BSV: Tensor, teacher: TeacherOutput, labels_BS: Tensor) -> Tensor:
    """Returns the KL divergence of each token [B, S] in nats, fp32 (float64 for a float64 model); 0 where the label is
    negative. Keeps about five tensors of B x S x V numbers until backward."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    log_q_BSV, log_p_BSV = logits_BSV.to(dtype).log_softmax(-1), teacher.log_prob_BSV.to(dtype)
    to_from = (log_q_BSV, log_p_BSV) if teacher.divergence == "forward" else (log_p_BSV, log_q_BSV)
    kl_BS = F.kl_div(*to_from, reduction="none", log_target=True).sum(-1)
    return torch.where(labels_BS < 0, 0.0, kl_BS)
