"""Mixture of depths: a layer computes some tokens, and all other tokens skip the layer (Raposo et al. 2024, arXiv
2404.02258; MoMa, arXiv 2407.21770, section 2.3). The layer selects among the tokens of all modalities together.

    s = <w, x / rms(x)>
    select a fraction c of the selection scope's tokens (rounded up): the tokens of largest s; ties go to the earlier token
    x <- x + sigmoid(s) layer(x)    for selected tokens, which keep their positions and attend only to selected tokens
    x <- x                          for all other tokens

In training the tokens of a selection scope compete for the layer (`moe_dist.moe.routers.selection`), as tokens compete for
an expert in expert choice. Evaluation decides by one of two rules, which read only one token:

    threshold   computes a token if sigmoid(s) > t. t is the running mean of the lowest selected score (`ThresholdUpdater`)
                plus the correction of the last calibration
    auxiliary   computes a token if SiLU(x W_1) W_2 > 0 (MoMa, section 2.4). W_1 and W_2 learn the selection by binary cross
                entropy while the model trains. Their input is detached, so their loss changes no other parameter

If the selection scope has several ranks, each forward of a layer in training costs one all-gather of T numbers per rank
(named `depth scores`), and one host sync, which reads the number of this rank's selected tokens.

Shape letters: B sequences, S positions, T = B x S tokens of this rank, D hidden size, C slots (places of computed tokens).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.names import DEPTH_SCORES
from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routers.selection import (
    OUTSIDE,
    AuxiliaryRouter,
    Causal,
    ChoosingRouter,
    SelectionScope,
    tokens_of_share,
)
from moe_dist.moe.routing.counts import DepthCounts
from moe_dist.placement.parameter_names import Role

_SHAPES = 8  # largest number of values of C on CUDA, because flex attention compiles for each C


class Chosen(NamedTuple):
    """The tokens that a layer computes, in the order of this rank's tokens.

    Attributes:
        index_C: int64, index of the token in each slot; 0 if the slot is empty. A slot is a place for a computed token.
        full_C: bool, true if the slot has a token.
        weight_C: sigmoid(s) of the slot's token with gradient, fp32 (float64 in a float64 model); 0 if the slot is empty.
        counts: The router's counts, which the layer's report contains.
        auxiliary: The auxiliary router's binary cross entropy, summed over tokens, with gradient, 0-d; None if not trained.
    """

    index_C: Tensor
    full_C: Tensor
    weight_C: Tensor
    counts: DepthCounts[Tensor]
    auxiliary: Tensor | None


class DepthRouter(ChoosingRouter):
    """Selects the tokens that one layer computes.

    `router` [1, D] is w. `causal="threshold"` adds three buffers [1]: `threshold` (a score; 0 admits every token), the
    running `mean` and the number of `steps`. The buffers have no gradient. Each step and each calibration
    (`moe_dist.train.evaluation.evaluator`) changes them, and checkpoints contain them.

    Args:
        capacity: c, the fraction of the scope's tokens that the layer computes.
        threshold_decay: Decay of the running mean per step.
        selection_scope: The ranks whose tokens compete; each rank must have the same number of tokens.
    """

    role = Role.DEPTH_ROUTER
    threshold: Tensor
    mean: Tensor
    steps: Tensor
    share_1: Tensor

    def __init__(
        self,
        hidden_dim: int,
        *,
        capacity: float,
        causal: Causal,
        threshold_decay: float = 0.99,
        selection_scope: SelectionScope | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.token_share, self.causal, self.threshold_decay, self.name = capacity, causal, threshold_decay, name
        self.selection_scope = selection_scope or SelectionScope()
        self.router = nn.Parameter(torch.empty(1, hidden_dim))
        self.auxiliary = AuxiliaryRouter(hidden_dim, 1) if causal == "auxiliary" else None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Creates the buffers (the capacity, and a threshold of 0) on the default device. Call this method again after
        moving the module from the meta device, where buffers have no values."""
        self.register_buffer("share_1", torch.tensor([self.token_share], dtype=torch.float64), persistent=False)
        if self.causal == "threshold":
            for buffer in ("threshold", "mean", "steps"):
                self.register_buffer(buffer, torch.zeros(1))

    def running_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the threshold, the running mean of the lowest selected score, and the number of steps."""
        return self.threshold, self.mean, self.steps

    def gates(self) -> "list[DepthRouter]":
        return [self]

    def num_taken(self, found: Chosen) -> Tensor:
        return found.counts.taken_P

    def forward(self, x_TD: Tensor, real_T: Tensor) -> Chosen:
        """Selects tokens. `real_T` (bool) is true for tokens that are not padding; only these compete.

        All arithmetic is fp32 (float64 for a float64 model). In training with the scope `rank` there are ceil(c T) slots,
        and nothing syncs with the host. In evaluation and with larger scopes, one host sync reads the number of selected
        tokens. There is always at least one slot, so that this rank takes part in the layer's collectives.
        """
        h_TD, logit_T = self._logits(x_TD)
        causal_T = self._causal(h_TD.detach(), logit_T.detach())  # the auxiliary loss trains only the auxiliary router
        causal_taken_T = (causal_T > 0) & real_T
        taken_T, slots, kth_score = causal_taken_T, None, logit_T.new_zeros(())
        if self.training or self.noncausal:
            logit_T1 = logit_T.detach().masked_fill(~real_T, OUTSIDE)[:, None]  # [T, 1]: one column, the layer
            lengths = self.selection_scope.lengths(len(logit_T), None)
            choice = self.selection_scope.choose(logit_T1, self.share_1, lengths, name=DEPTH_SCORES, layer=self.name)
            taken_T, kth_score = choice.taken_TE[:, 0], choice.kth_score_E[0]
            if choice.order_TE is not None:  # in the scope `rank` C follows from the number of tokens, without a sync
                slots = tokens_of_share(self.token_share, len(logit_T))
        index_C, full_C = _slots(taken_T, slots)
        weight_C = torch.where(full_C, logit_T[index_C].sigmoid(), 0.0)
        tokens = real_T.sum()
        counts = DepthCounts(
            tokens_P=tokens[None],
            taken_P=taken_T.sum()[None],
            agreed_P=((causal_taken_T == taken_T) & real_T).sum()[None],
            kth_score_P=(kth_score.to(torch.float64) * tokens)[None],
            weight_P=weight_C.detach().to(torch.float64).sum()[None],
        )
        return Chosen(index_C, full_C, weight_C, counts, self._auxiliary_loss(causal_T, taken_T, real_T))

    def scores(self, x_TD: Tensor, real_T: Tensor) -> Tensor:
        """Returns sigmoid(s) [T, 1]; 0 for padding."""
        _, logit_T = self._logits(x_TD)
        return torch.where(real_T, logit_T.sigmoid(), 0.0)[:, None]

    def takes(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Decides by evaluation's causal rule. Returns a bool mask [T] of the tokens to compute, and weights [T]."""
        h_TD, logit_T = self._logits(x_TD)
        return self._causal(h_TD, logit_T) > 0, logit_T.sigmoid()

    def _logits(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x / rms(x) [T, D], and s [T]."""
        h_TD = x_TD.to(accumulation_dtype(x_TD.dtype))
        with torch.autocast(device_type=h_TD.device.type, enabled=False):
            h_TD = F.rms_norm(h_TD, (h_TD.shape[-1],), eps=1e-6)  # without the norm s would grow with the residual stream
            # No matrix product, because its bits would depend on the number of tokens in the batch.
            return h_TD, (h_TD * self.router.to(h_TD.dtype)).sum(-1)

    def _causal(self, h_TD: Tensor, logit_T: Tensor) -> Tensor:
        """Returns a number per token [T]. Evaluation computes the token if this number is above 0."""
        if self.auxiliary is not None:
            return self.auxiliary(h_TD).squeeze(-1)
        return logit_T.sigmoid() - self.threshold.to(logit_T.dtype)

    def _auxiliary_loss(self, causal_T: Tensor, taken_T: Tensor, real_T: Tensor) -> Tensor | None:
        """Returns the auxiliary router's cross entropy, whose target is the selection, summed over tokens, or None."""
        if self.auxiliary is None or not self.training:
            return None
        losses_T = F.binary_cross_entropy_with_logits(causal_T, taken_T.to(causal_T.dtype), reduction="none")
        return torch.where(real_T, losses_T, 0.0).sum()


def _slots(taken_T: Tensor, slots: int | None) -> tuple[Tensor, Tensor]:
    """Returns the token index of each slot (ascending; 0 for an empty slot), and a bool mask of the slots with a token."""
    length = taken_T.shape[0]
    if slots is None:
        slots = int(taken_T.sum())  # host sync: the number of tokens that the layer computes
        step = max(1, -(-length // _SHAPES)) if taken_T.is_cuda else 1  # C is rounded up to a multiple of `step`
        slots = min(length, -(-slots // step) * step)
    place_T = torch.arange(length, device=taken_T.device)
    first_C = torch.where(taken_T, place_T, length).sort().values[: max(1, slots)]
    full_C = first_C < length
    return torch.where(full_C, first_C, 0), full_C


def slot_documents(documents_BS: Tensor, chosen: Chosen) -> Tensor:
    """Returns the document number of each slot [1, C]. Two sequences have no number in common. Each empty slot has a
    different number, so that no token attends to an empty slot."""
    sequences, length = documents_BS.shape
    offset_B1 = torch.arange(sequences, device=documents_BS.device)[:, None] * (length + 1)
    document_C = (documents_BS + offset_B1).flatten()[chosen.index_C]
    empty_C = -1 - torch.arange(len(document_C), device=documents_BS.device)
    return torch.where(chosen.full_C, document_C, empty_C)[None]
