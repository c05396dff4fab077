"""A stand-in for `deep_ep.Buffer` (API of V1) in torch over gloo: the meaning of its three calls, and its demands.

Rows arrive by source rank, then by token, those of the own rank among them. `recv_topk_idx` holds ids within the rank, -1
for what lives elsewhere; the weight beside a -1 is 0. Combine adds rows, and weights, without weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Handle:
    """What a dispatch leaves for combine and for repeated dispatches."""

    is_token_in_rank: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]


class GlooBuffer:
    """The part of `deep_ep.Buffer` that the adaptor uses."""

    def __init__(self, group: dist.ProcessGroup, *, any_dtype: bool = False) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.any_dtype = any_dtype

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Tensor, None, Tensor, Tensor, None]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert num_experts % self.size == 0, "every rank holds the same number of experts"
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        per_rank = num_experts // self.size
        chosen = torch.zeros(topk_idx.shape[0], num_experts, dtype=torch.int64)
        for token, row in enumerate(topk_idx.tolist()):
            for expert in row:
                if expert >= 0:
                    chosen[token, expert] += 1
        assert (chosen <= 1).all(), "a token selects an expert once"
        in_rank = chosen.view(-1, self.size, per_rank).sum(-1) > 0
        return in_rank.sum(0).int(), None, chosen.sum(0).int(), in_rank, None

    def dispatch(
        self, x: Tensor, handle: Handle | None = None, num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None, is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert x.is_contiguous()
        assert self.any_dtype or x.dtype == torch.bfloat16
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            return self._rows(x, handle), None, None, None, None, None
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.shape == topk_idx.shape
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_rdma_rank is None
        incoming = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(incoming, num_tokens_per_rank, group=self.group)
        handle = Handle(is_token_in_rank, tuple(num_tokens_per_rank.tolist()), tuple(incoming.tolist()))
        per_rank = num_tokens_per_expert.shape[0] // self.size
        idx, weights = self._rows(topk_idx, handle), self._rows(topk_weights, handle)
        here = (idx >= self.rank * per_rank) & (idx < (self.rank + 1) * per_rank)
        idx = torch.where(here, idx - self.rank * per_rank, -1)
        counts = [int((idx == slot).sum()) for slot in range(per_rank)]
        return self._rows(x, handle), idx, torch.where(here, weights, 0.0), counts, handle, None

    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert x.is_contiguous()
        assert x.shape[0] == sum(handle.received)
        assert self.any_dtype or x.dtype == torch.bfloat16
        weights = None if topk_weights is None else self._reduce(topk_weights, handle)
        return self._reduce(x, handle), weights, None

    def _tokens(self, handle: Handle) -> Tensor:
        """Token of each row sent, by destination rank."""
        return torch.cat([column.nonzero()[:, 0] for column in handle.is_token_in_rank.unbind(1)])

    def _rows(self, table: Tensor, handle: Handle) -> Tensor:
        received = table.new_empty(sum(handle.received), *table.shape[1:])
        rows = table[self._tokens(handle)]
        dist.all_to_all_single(received, rows, list(handle.received), list(handle.sent), group=self.group)
        return received

    def _reduce(self, rows: Tensor, handle: Handle) -> Tensor:
        back = rows.new_empty(sum(handle.sent), *rows.shape[1:])
        dist.all_to_all_single(back, rows, list(handle.sent), list(handle.received), group=self.group)
        wide = torch.promote_types(rows.dtype, torch.float32)
        table = torch.zeros(handle.is_token_in_rank.shape[0], *rows.shape[1:], dtype=wide)
        return table.index_add_(0, self._tokens(handle), back.to(wide)).to(rows.dtype)
