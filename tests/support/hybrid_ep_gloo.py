"""A stand-in for `deep_ep.HybridEPBuffer` (branch hybrid-ep) in torch over gloo.

It implements dispatch with permutation and combine with the reverse permutation, and checks the requirements of
`deep_ep/hybrid_ep_buffer.py` and `csrc/hybrid_ep/` on that branch. Pairs arrive sorted by expert, then by source rank, then
by token. With a handle the host does not know `num_permuted_tokens`, so a repeated dispatch must pass this number.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.deep_ep_gloo import as_package
from tests.support.sorted_pairs_gloo import SortedPairs

ROUTING, FUSED = 4, 9  # positions in the handle: of the routing, and of the flag for a fused dispatch


class HybridEPBuffer:
    """The part of `deep_ep.HybridEPBuffer` that permutes."""

    strict = True  # if false, accepts rows of any dtype and width
    ranks_per_domain = 0  # number of neighbouring ranks in an NVLink domain; 0 means all

    def __init__(
        self, group: dist.ProcessGroup, hidden_dim: int, max_num_of_tokens_per_rank: int, num_local_experts: int,
        use_fp8: bool = False, num_sms_dispatch_api: int | None = None, num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None, num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None, load_cached_kernels: bool = False, use_shared_buffer: bool = True,
        enable_custom_allgather: bool = False,
    ) -> None:  # fmt: skip
        assert not use_fp8
        self.group, self.size = group, dist.get_world_size(group)
        self.num_of_hybrid_ep_ranks_per_nvlink_domain = self.ranks_per_domain or self.size
        self.hidden_dim, self.num_local_experts = hidden_dim, num_local_experts
        assert num_local_experts * self.num_of_hybrid_ep_ranks_per_nvlink_domain % 4 == 0
        dist.barrier(group)  # requires that every rank creates its buffer

    def dispatch_with_permute(
        self, *, hidden: Tensor, topk_idx: None = None, topk_weights: None = None,
        num_of_experts_per_rank: int | None = None, num_of_experts: int | None = None, use_fp8: bool | None = None,
        routing_map: Tensor | None = None, probs: Tensor | None = None, scaling_factor: None = None,
        num_permuted_tokens: int | None = None, pad_multiple: int | None = None, handle: tuple[Any, ...] | None = None,
        non_blocking: bool = False, fuse_permute_dispatch: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert not non_blocking
        assert not pad_multiple
        self._check_rows(hidden)
        if handle is None:
            assert hidden.shape[0] == routing_map.shape[0]
            assert num_of_experts_per_rank in (None, self.num_local_experts)
            handle = self._handle(routing_map, fused=fuse_permute_dispatch)
        else:
            assert routing_map is None
            assert hidden.shape[0] == handle[8], "This handle could be invalid."
            assert num_permuted_tokens is not None
            assert fuse_permute_dispatch == handle[FUSED]
        routing: SortedPairs = handle[ROUTING]
        assert num_permuted_tokens in (None, sum(routing.counts))
        weight_Q = None
        if probs is not None:
            assert probs.dtype == torch.float32
            assert probs.is_contiguous()
            assert probs.shape == (hidden.shape[0], self.size * self.num_local_experts)
            weight_Q = routing.weights(probs)
        padded_tokens_per_expert = torch.tensor(routing.counts, dtype=torch.int64)
        return routing.dispatch(hidden), weight_Q, None, padded_tokens_per_expert, handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None = None, handle: tuple[Any, ...] | None = None,
        pad_multiple: int | None = None, fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        assert handle is not None, "The handle is necessary in the combine pass."
        assert not pad_multiple
        assert fuse_unpermute_combine == handle[FUSED]
        self._check_rows(hidden)
        routing: SortedPairs = handle[ROUTING]
        assert hidden.shape[0] == sum(routing.counts)
        if probs is None:
            return routing.combine(hidden), None
        assert probs.dtype == torch.float32
        assert probs.is_contiguous()
        assert probs.shape == hidden.shape[:1]
        return routing.combine(hidden), routing.weights_back(probs)

    def _check_rows(self, hidden: Tensor) -> None:
        assert hidden.is_contiguous()
        assert hidden.shape[1] == self.hidden_dim
        if self.strict:
            assert hidden.dtype == torch.bfloat16
            assert hidden.shape[1] % 16 == 0

    def _handle(self, routing_map: Tensor, *, fused: bool) -> tuple[Any, ...]:
        """Gathers the map, as HybridEP does. Every rank must have the same number of tokens."""
        assert routing_map.dtype == torch.bool
        assert routing_map.is_contiguous()
        assert routing_map.shape[1] == self.size * self.num_local_experts
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([routing_map.shape[0]]), group=self.group)
        assert len({int(length) for length in lengths}) == 1, "every rank has the same number of tokens"
        if self.strict:
            assert routing_map.shape[0] * self.num_of_hybrid_ep_ranks_per_nvlink_domain % 4 == 0, "TMA 16B alignment"
        routing = SortedPairs(self.group, routing_map)
        arrived = torch.tensor([routing.num_rows], dtype=torch.int32)
        # The handle of a dense layout has eleven fields. Field 3 counts arrived rows, field 8 this rank's tokens.
        return None, None, None, arrived, routing, None, None, None, routing_map.shape[0], fused, None


@contextmanager
def hybrid_ep(*, strict: bool = True, ranks_per_domain: int = 0) -> Iterator[None]:
    """Makes `import deep_ep` import this stand-in."""
    package: AbstractContextManager[None] = as_package(HybridEPBuffer)
    domain = patch.object(HybridEPBuffer, "ranks_per_domain", ranks_per_domain)
    with patch.object(HybridEPBuffer, "strict", strict), domain, package:
        yield
