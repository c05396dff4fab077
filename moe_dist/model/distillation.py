"""Computes distillation losses: the divergence between a model's and a teacher's distributions of the next token (Hinton et
al., arXiv 1503.02531, at temperature 1).

    forward KL = sum over words v of p_v (log p_v - log q_v)        p: teacher, q: model
    reverse KL = sum over words v of q_v (log q_v - log p_v)

If only the teacher's K most likely words are known, all other words count as one additional word, which has the remaining
probability. The forward KL over K + 1 words is at most the forward KL over all words. Shape letters: B sequences, S
positions, V vocabulary, K words per token.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.model.layers import token_losses

Divergence = Literal["forward", "reverse"]


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's log-probabilities of the next token, for all words or only for `word_BSK`. Have no gradient."""

    log_prob_BSK: Tensor  # fp32 (float64 for a float64 model)
    word_BSK: Tensor | None = None  # int64, K < V different words; None for all words in order (K = V)
    divergence: Divergence = "forward"  # `reverse` needs all words

    def losses(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Tensor:
        """Returns cross entropies and divergences [2, B, S]; see `moe_dist.model.objective`."""
        logits_BSV = F.linear(x_BSD, weight_VD.to(x_BSD.dtype))
        return torch.stack([token_losses(logits_BSV, labels_BS), divergences(logits_BSV, self, labels_BS)])


def divergences(logits_BSV: Tensor, teacher: TeacherOutput, labels_BS: Tensor) -> Tensor:
    """Returns the KL divergence of each token [B, S] in nats, fp32 (float64 for a float64 model); 0 where the label is
    negative. Keeps about five tensors of B x S x V numbers until backward."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)
    log_q_BSV, log_p_BSK = logits_BSV.to(dtype).log_softmax(-1), teacher.log_prob_BSK.to(dtype)
    if teacher.word_BSK is None:
        to_from = (log_q_BSV, log_p_BSK) if teacher.divergence == "forward" else (log_p_BSK, log_q_BSV)
        kl_BS = F.kl_div(*to_from, reduction="none", log_target=True).sum(-1)
    else:
        p_BSK, log_q_BSK = log_p_BSK.exp(), log_q_BSV.gather(-1, teacher.word_BSK)
        rest_BS = (1.0 - p_BSK.sum(-1)).clamp_min(0.0)
        # sums q over words outside the K words, because 1 - (sum of q) loses all digits if the sum is near 1
        log_q_rest_BS = log_q_BSV.scatter(-1, teacher.word_BSK, float("-inf")).logsumexp(-1)
        kl_BS = (p_BSK * (log_p_BSK - log_q_BSK)).sum(-1) + torch.xlogy(rest_BS, rest_BS) - rest_BS * log_q_rest_BS
    return torch.where(labels_BS < 0, 0.0, kl_BS)
