"""Mixture of depths: a block computes a share of the tokens, the others pass it by the residual (Raposo et al. 2024, arXiv
2404.02258; MoMa, arXiv 2407.21770, section 2.3, before the tokens are split by modality).

    s = <w, x / rms(x)>,  the ceil(c T) tokens of largest s in the selection scope are taken; ties go to the earlier token
    x <- x + sigmoid(s) block(x) for them, with their positions and among themselves; x <- x for the others

The choice looks at all tokens of its set, later ones among them, so it is for training only. In evaluation each token is
judged by itself, causally:

    threshold   taken where sigmoid(s) > c, the running mean of the last score that was taken (as Expert Threshold, arXiv
                2603.11535, has it for expert choice) and the correction of the last calibration
    auxiliary   taken where SiLU(x W_1) W_2 > 0 (MoMa, section 2.4); W_1 and W_2 learn the choice by binary cross entropy
                while the model trains, from inputs without gradient, so that they move nothing else

The selection scopes: the tokens of one rank's micro-batch (`rank`; no collective), of an EP group's or of all ranks'. The larger
two exchange scores: one all-gather a block and training forward, called `depth scores`, T numbers from each rank, and one
host sync for how many tokens of this rank were taken. A token's number in the set is its rank's place and its place there.

Shape letters: B sequences, S positions, T = B x S tokens of this rank, D hidden size, C slots (tokens that are computed),
W ranks of the set.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.moe.routing import DepthSums, accumulation_dtype

Causal = Literal["threshold", "auxiliary"]
_OUT = float("-inf")  # score of padding, which never competes
_SHAPES = 8  # different numbers of slots on CUDA, where each is compiled


class Chosen(NamedTuple):
    """The tokens that a block computes, in the order of the sequence.

    Attributes:
        index_C: int64, a token of this rank for each slot; 0 where the slot is empty.
        full_C: bool, the slot holds a token.
        weight_C: Its weight with gradient, fp32 (float64 in a float64 model); 0 where it is empty.
        sums: What the layer reports.
    """

    index_C: Tensor
    full_C: Tensor
    weight_C: Tensor
    sums: DepthSums


class SelectionScope(Protocol):
    """The tokens that compete for a block's room."""

    def choose(self, score_T: Tensor, capacity: float, *, name: str) -> tuple[Tensor, Tensor, int | None]:
        """Which of this rank's tokens are taken.

        Args:
            score_T: fp32 or float64 without gradient, -inf for padding.
            capacity: c.
            name: Of the layer, for reports.

        Returns:
            taken_T: bool.
            cut: Score of the last token of the set that is taken; +inf where there is none.
            slots: Their number at most, where that is known without looking.
        """
        ...


@dataclass(frozen=True)
class DepthScope:
    """A selection scope over the ranks of a group.

    Attributes:
        group: None for this rank alone.
        own, size: This rank's place, and the number of ranks.
        comm_stats, tracker: Where the collective is counted and noted.
    """

    group: dist.ProcessGroup | None = None
    own: int = 0
    size: int = 1
    comm_stats: CommStats | None = None
    tracker: CollectiveTracker | None = None

    def choose(self, score_T: Tensor, capacity: float, *, name: str) -> tuple[Tensor, Tensor, int | None]:
        """See `SelectionScope`. All ranks of the group must bring as many tokens."""
        length = score_T.shape[0]
        if self.group is None:
            taken_T, cut = take_best(score_T, capacity)
            return taken_T, cut, room(capacity, length)
        gathered = score_T.new_empty(self.size * length)
        if self.comm_stats is not None:
            self.comm_stats.count("depth scores", (self.size - 1) * score_T.nbytes, payload=False)
        with track_collective(self.tracker, "depth scores", device=score_T.device, layer=name):
            dist.all_gather_into_tensor(gathered, score_T.contiguous(), group=self.group)
        taken, cut = take_best(gathered, capacity)
        return taken[self.own * length :][:length], cut, None


def room(capacity: float, tokens: int) -> int:
    """ceil(c T), at most T. A product whole but for its last bits is not rounded up."""
    return min(tokens, max(0, math.ceil(capacity * tokens - 1e-9)))


def take_best(score_U: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """The ceil(c n) largest of a set's n scores that are not padding's, bool [U], and the least of them (+inf for none).

    Ties go to the earlier token. No shape depends on data.
    """
    order_U = torch.sort(score_U, descending=True, stable=True).indices
    competing = (score_U != _OUT).sum()
    wanted = torch.ceil(capacity * competing.to(torch.float64) - 1e-9).to(torch.int64).clamp(min=0)
    wanted = torch.minimum(wanted, competing)
    place_U = torch.arange(score_U.shape[0], device=score_U.device)
    taken_U = torch.zeros_like(place_U, dtype=torch.bool).scatter_(0, order_U, place_U < wanted)
    cut = torch.where(taken_U, score_U, float("inf")).amin()
    return taken_U, cut


class AuxiliaryRouter(nn.Module):
    """Two layers, `inner` [D/2, D] and `outer` [1, D/2], without bias."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        inner_dim = max(1, hidden_dim // 2)
        self.inner = nn.Parameter(torch.empty(inner_dim, hidden_dim))
        self.outer = nn.Parameter(torch.empty(1, inner_dim))

    def forward(self, h_TD: Tensor) -> Tensor:
        """Logits [T]: above 0 the token is taken."""
        return F.linear(F.silu(F.linear(h_TD, self.inner.to(h_TD.dtype))), self.outer.to(h_TD.dtype)).squeeze(-1)


class DepthRouter(nn.Module):
    """Chooses the tokens of one block.

    `router` [1, D] is w. With thresholds, `threshold` (a score in (0, 1); 0 lets everything through), the running `mean` in
    it and `steps`, [1] each, are buffers, since no gradient moves them: they change after a step (`DepthThresholds`) or by
    calibration (`moe_dist.train.evaluation.calibration`), and are saved with the weights.

    Args:
        hidden_dim: D.
        capacity: c, the share of the set's tokens that the block computes.
        causal: How a token is judged in evaluation.
        threshold_decay: Of the running mean, a step.
        selection_scope: The tokens that compete.
        name: Of the layer, for reports.
    """

    threshold: Tensor
    mean: Tensor
    steps: Tensor

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
        self.capacity, self.threshold_decay, self.name = capacity, threshold_decay, name
        self.causal: Causal = causal
        self.selection_scope: SelectionScope = selection_scope or DepthScope()
        self.router = nn.Parameter(torch.empty(1, hidden_dim))
        self.auxiliary = AuxiliaryRouter(hidden_dim) if causal == "auxiliary" else None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Makes thresholds of 0 on the default device; called again after a move from the meta device."""
        if self.causal == "threshold":
            self.register_buffer("threshold", torch.zeros(1))
            self.register_buffer("mean", torch.zeros(1))
            self.register_buffer("steps", torch.zeros(1))

    def forward(self, x_TD: Tensor, real_T: Tensor) -> Chosen:
        """Chooses among the tokens that are not padding (bool `real_T`).

        All arithmetic is fp32 (float64 for a float64 model). While training with the tokens of this rank alone the number
        of slots is ceil(c T) and nothing syncs; else it is the number of tokens taken, and costs one host sync. There is
        always one slot at least, so that the block's collectives go on.
        """
        h_TD, logit_T = self._logits(x_TD)
        causal_T = self._causal(h_TD.detach(), logit_T.detach())
        causal_taken_T = (causal_T > 0) & real_T
        slots, cut = None, logit_T.new_full((), float("inf"))
        taken_T = causal_taken_T
        if self.training:
            score_T = logit_T.detach().masked_fill(~real_T, _OUT)
            taken_T, cut, slots = self.selection_scope.choose(score_T, self.capacity, name=self.name)
        index_C, full_C = _compact(taken_T, slots)
        weight_C = torch.where(full_C, logit_T[index_C].sigmoid(), 0.0)
        return Chosen(index_C, full_C, weight_C, self._sums(causal_T, causal_taken_T, taken_T, cut, weight_C, real_T))

    def scores(self, x_TD: Tensor, real_T: Tensor) -> Tensor:
        """sigmoid(s) [T, 1]; 0 for padding."""
        _, logit_T = self._logits(x_TD)
        return torch.where(real_T, logit_T.sigmoid(), 0.0)[:, None]

    def takes(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Each token by itself, as in evaluation: whether it is taken, bool [T], and its weight [T]."""
        h_TD, logit_T = self._logits(x_TD)
        return self._causal(h_TD, logit_T) > 0, logit_T.sigmoid()

    def _logits(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The input at rms 1 (so that the residual stream's growth is not the router's), and s."""
        h_TD = x_TD.to(accumulation_dtype(x_TD.dtype))
        with torch.autocast(device_type=h_TD.device.type, enabled=False):
            h_TD = F.rms_norm(h_TD, (h_TD.shape[-1],), eps=1e-6)
            # A product a token, not a matrix product: its bits do not depend on how many tokens stand beside it.
            return h_TD, (h_TD * self.router.to(h_TD.dtype)).sum(-1)

    def _causal(self, h_TD: Tensor, logit_T: Tensor) -> Tensor:
        """What is above 0 where the token is taken in evaluation."""
        if self.auxiliary is not None:
            return self.auxiliary(h_TD)
        return logit_T.sigmoid() - self.threshold.to(logit_T.dtype)

    def _sums(
        self, causal_T: Tensor, causal_taken_T: Tensor, taken_T: Tensor, cut: Tensor, weight_C: Tensor, real_T: Tensor
    ) -> DepthSums:
        tokens = real_T.sum()
        auxiliary = None
        if self.auxiliary is not None and self.training:
            losses_T = F.binary_cross_entropy_with_logits(causal_T, taken_T.to(causal_T.dtype), reduction="none")
            auxiliary = torch.where(real_T, losses_T, 0.0).sum()
        cut_score = torch.where(cut.isfinite(), cut.sigmoid(), 0.0)
        return DepthSums(
            tokens=tokens,
            taken=taken_T.sum(),
            agreed=((causal_taken_T == taken_T) & real_T).sum(),
            cut=cut_score.to(torch.float64) * tokens,
            weight=weight_C.detach().to(torch.float64).sum(),
            auxiliary=auxiliary,
        )


class DepthThresholds:
    """Moves the thresholds of a model's depth routers after each step; their state is in the routers' buffers.

    m <- m + w (q - m), c = m + d, with q the mean score of the last token taken (sets weighted by their tokens),
    w = 1 / steps at first, then 1 - decay, and d what the last calibration set it off by. All ranks move alike, from sums
    over all of them.
    """

    def __init__(self, routers: list[DepthRouter]) -> None:
        self._routers = routers

    @torch.no_grad()
    def __call__(self, kth_score_L: Tensor, tokens_L: Tensor) -> None:
        """After a step that was taken: sums of `DepthSums` over its micro-batches and ranks, by depth layer. No sync."""
        for router, cut, tokens in zip(self._routers, kth_score_L, tokens_L, strict=True):
            seen = tokens > 0
            steps = router.steps + seen.to(router.steps.dtype)
            weight = torch.where(seen, (1.0 / steps.clamp_min(1.0)).clamp_min(1.0 - router.threshold_decay), 0.0)
            moved = weight * ((cut / tokens.clamp_min(1.0)).to(router.mean.dtype) - router.mean)
            router.mean.add_(moved)
            router.threshold.add_(moved)
            router.steps.copy_(steps)


def _compact(taken_T: Tensor, slots: int | None) -> tuple[Tensor, Tensor]:
    """Token of each slot in rising order, and which slots are full."""
    length = taken_T.shape[0]
    if slots is None:
        slots = int(taken_T.sum())  # host sync: how many tokens the block computes
        step = max(1, -(-length // _SHAPES)) if taken_T.is_cuda else 1
        slots = min(length, -(-slots // step) * step)
    place_T = torch.arange(length, device=taken_T.device)
    first_C = torch.where(taken_T, place_T, length).sort().values[: max(1, slots)]
    full_C = first_C < length
    return torch.where(full_C, first_C, 0), full_C


def slot_documents(documents_BS: Tensor, chosen: Chosen) -> Tensor:
    """Document of each slot [1, C], distinct over the sequences; an empty slot is a document of its own."""
    sequences, length = documents_BS.shape
    offset_B1 = torch.arange(sequences, device=documents_BS.device)[:, None] * (length + 1)
    document_C = (documents_BS + offset_B1).flatten()[chosen.index_C]
    empty_C = -1 - torch.arange(len(document_C), device=documents_BS.device)
    return torch.where(chosen.full_C, document_C, empty_C)[None]
