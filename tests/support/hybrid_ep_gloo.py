"""A stand-in for `deep_ep.HybridEPBuffer` (branch hybrid-ep) in torch over gloo: dispatch and combine, and their demands.

Rows arrive by source rank, then by token, those of the own rank among them. Probabilities arrive with one column for each
expert of the NVLink domain, of which only the own ones mean something: the others hold NaN here. On the way back the
others must be zero. The map of the own experts in the handle is longer than what arrived, and what lies behind it is junk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LOCAL_MAP = 4


class GlooHybridBuffer:
    """The part of `deep_ep.HybridEPBuffer` that the adaptor uses.

    Args:
        ranks_per_domain: Neighbouring ranks that make an NVLink domain.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, num_local_experts: int, ranks_per_domain: int, any_dtype: bool = False
    ) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.local_rank = self.rank % ranks_per_domain
        self.ranks_per_domain = ranks_per_domain
        self.num_local_experts = num_local_experts
        self.any_dtype = any_dtype
        assert num_local_experts * ranks_per_domain % 4 == 0

    def dispatch(
        self, hidden: Tensor, scaling_factor: None = None, topk_idx: None = None, topk_weights: None = None,
        num_of_experts: int | None = None, probs: Tensor | None = None, routing_map: Tensor | None = None,
        num_dispatched_tokens_tensor: None = None, num_dispatched_tokens: int | None = None,
        handle: tuple[Any, ...] | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert hidden.is_contiguous()
        assert self.any_dtype or hidden.dtype == torch.bfloat16
        if routing_map is None:
            assert num_of_experts == self.size * self.num_local_experts
            assert handle is not None
        if handle is None:
            assert routing_map is not None
            handle = self._handle(routing_map)
        sent, received = handle[0], handle[1]
        assert num_dispatched_tokens in (None, sum(received))
        rows = self._rows(hidden, handle)
        if probs is None:
            return rows, None, None, handle
        assert probs.dtype == torch.float32
        assert probs.is_contiguous()
        assert probs.shape == (hidden.shape[0], self.size * self.num_local_experts)
        arrived = self._rows(probs, handle)[:, self._own_columns]
        domain = torch.full((sum(received), self.ranks_per_domain * self.num_local_experts), float("nan"))
        domain[:, self._domain_columns] = arrived
        assert len(sent) == self.size
        return rows, domain, None, handle

    def combine(self, hidden: Tensor, probs: Tensor | None = None, handle: tuple[Any, ...] | None = None) -> Any:
        assert handle is not None
        assert hidden.is_contiguous()
        assert hidden.shape[0] == sum(handle[1])
        assert self.any_dtype or hidden.dtype == torch.bfloat16
        if probs is None:
            return self._reduce(hidden, handle), None
        assert probs.dtype == torch.float32
        assert probs.shape == (hidden.shape[0], self.ranks_per_domain * self.num_local_experts)
        others = probs.clone()
        others[:, self._domain_columns] = 0
        assert (others == 0).all()
        whole = torch.zeros(hidden.shape[0], self.size * self.num_local_experts)
        whole[:, self._own_columns] = probs[:, self._domain_columns]
        return self._reduce(hidden, handle), self._reduce(whole, handle)

    @property
    def _own_columns(self) -> slice:
        return slice(self.rank * self.num_local_experts, (self.rank + 1) * self.num_local_experts)

    @property
    def _domain_columns(self) -> slice:
        return slice(self.local_rank * self.num_local_experts, (self.local_rank + 1) * self.num_local_experts)

    def _handle(self, routing_map: Tensor) -> tuple[Any, ...]:
        """Gathers the map, as HybridEP does: every rank has the same number of tokens."""
        assert routing_map.dtype == torch.bool
        assert routing_map.is_contiguous()
        assert routing_map.shape[1] == self.size * self.num_local_experts
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([routing_map.shape[0]]), group=self.group)
        assert len({int(length) for length in lengths}) == 1, "every rank has the same number of tokens"
        maps = [torch.empty(routing_map.shape, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(maps, routing_map.to(torch.uint8), group=self.group)
        mine = [each.bool()[:, self._own_columns] for each in maps]
        here = torch.cat([each[each.any(1)] for each in mine])
        junk = torch.ones(sum(each.shape[0] for each in maps) - here.shape[0], self.num_local_experts, dtype=torch.bool)
        in_rank = routing_map.view(-1, self.size, self.num_local_experts).any(2)
        sent = tuple(in_rank.sum(0).tolist())
        received = tuple(int(each.any(1).sum()) for each in mine)
        return sent, received, in_rank, None, torch.cat([here, junk]), routing_map.shape[0], None

    def _tokens(self, handle: tuple[Any, ...]) -> Tensor:
        """Token of each row sent, by destination rank."""
        return torch.cat([column.nonzero()[:, 0] for column in handle[2].unbind(1)])

    def _rows(self, table: Tensor, handle: tuple[Any, ...]) -> Tensor:
        sent, received = handle[0], handle[1]
        rows = table.new_empty(sum(received), *table.shape[1:])
        dist.all_to_all_single(rows, table[self._tokens(handle)], list(received), list(sent), group=self.group)
        return rows

    def _reduce(self, rows: Tensor, handle: tuple[Any, ...]) -> Tensor:
        sent, received = handle[0], handle[1]
        back = rows.new_empty(sum(sent), *rows.shape[1:])
        dist.all_to_all_single(back, rows.contiguous(), list(sent), list(received), group=self.group)
        wide = torch.promote_types(rows.dtype, torch.float32)
        table = torch.zeros(handle[2].shape[0], *rows.shape[1:], dtype=wide)
        return table.index_add_(0, self._tokens(handle), back.to(wide)).to(rows.dtype)
