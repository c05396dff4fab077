"""A stand-in for the package deep_ep with `ElasticBuffer` (DeepEP V2, version 2.1), in torch over gloo.

Arguments, results and requirements are those of `deep_ep/buffers/elastic.py` and `csrc/elastic/buffer.hpp` for the
expanded layout, and of the kernels if they require more. With `async_with_compute_stream` a result is NaN until the
caller waits for its event.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.sorted_pairs_gloo import SortedPairs


@dataclass(frozen=True)
class EPHandle:
    """The handle's public fields, and the routing."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    routing: SortedPairs


class EventOverlap:
    def __init__(self, finish: Callable[[], None] | None) -> None:
        self.finish = finish

    def current_stream_wait(self) -> None:
        assert self.finish is not None, "only an asynchronous call has an event"
        self.finish()


class ElasticBuffer:
    """The expert-parallel part of `deep_ep.ElasticBuffer`."""

    strict = True  # False accepts rows of any dtype and width.
    id_dtype = torch.int64

    def __init__(
        self, group: dist.ProcessGroup, num_bytes: int | None = None, num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0, use_fp8_dispatch: bool = False,
        deterministic: bool = False, allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True, sl_idx: int = 3, num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        assert num_bytes is None
        assert not use_fp8_dispatch
        self.group, self.size = group, dist.get_world_size(group)
        self.num_max_tokens_per_rank, self.hidden, self.num_topk = num_max_tokens_per_rank, hidden, num_topk
        self.deterministic, self.allow_multiple_reduction = deterministic, allow_multiple_reduction
        limits = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(limits, torch.tensor([num_max_tokens_per_rank]), group=group)  # all ranks must create buffers
        assert len({int(limit) for limit in limits}) == 1, "all ranks have one limit of tokens"

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        assert num_experts % self.size == 0  # raises TypeError if None is given
        return 4 + 2 * num_topk

    def dispatch(
        self, x: Tensor, topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None, num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None, expert_alignment: int | None = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False, handle: EPHandle | None = None,
        do_handle_copy: bool = True, do_cpu_sync: bool | None = None, do_expand: bool = False,
        do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        ids = topk_idx if handle is None else handle.topk_idx
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, ids.shape[1])  # pyright: ignore[reportArgumentType]
        assert previous_event is None or allocate_on_comm_stream
        assert do_expand, "this stand-in has the expanded layout alone"
        self._check_rows(x)
        limit = num_max_tokens_per_rank or (self if handle is None else handle).num_max_tokens_per_rank
        assert x.shape[0] == ids.shape[0] <= limit <= self.num_max_tokens_per_rank
        if handle is not None:
            assert topk_idx is None
            assert not do_cpu_sync, "Cannot do CPU sync with cached handle"
            assert num_experts in (None, handle.num_experts)
            assert expert_alignment in (None, handle.expert_alignment)
            assert do_expand == handle.do_expand
            assert num_sms == handle.num_sms, "between nodes the number of channels comes from the number of SMs"
        else:
            assert expert_alignment in (None, 1)
            assert do_cpu_sync in (None, True), "without it the sizes are bounds"
            chosen_TX = self._chosen(ids, num_experts)
            routing = SortedPairs(self.group, chosen_TX, last_first=not self.deterministic)
            kept = ids.clone() if do_handle_copy else ids
            sizes = (num_sms, kept, routing.num_rows, routing.counts, routing)
            handle = EPHandle(do_expand, num_experts, 1, limit, *sizes)
        weight_Q = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == ids.shape
            weight_Q = handle.routing.weights(self._table(topk_weights, ids, handle.num_experts))
        results, event = self._results([handle.routing.dispatch(x), weight_Q], async_with_compute_stream)
        return results[0], None, results[1], handle, event

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None, bias: Any = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert bias is None
        assert previous_event is None or allocate_on_comm_stream
        self._check_rows(x)
        assert x.shape[0] == sum(handle.num_recv_tokens_per_expert_list)
        weights = None
        if topk_weights is not None:
            assert self.allow_multiple_reduction
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
            assert topk_weights.shape == x.shape[:1], "one weight for each pair"
            table_TX, ids = handle.routing.weights_back(topk_weights), handle.topk_idx.long()
            weights = torch.where(ids < 0, 0.0, table_TX.gather(1, ids.clamp_min(0)))
        results, event = self._results([handle.routing.combine(x), weights], async_with_compute_stream)
        return *results, event

    def _check_rows(self, x: Tensor) -> None:
        assert x.is_contiguous()
        assert x.dim() == 2
        assert x.shape[1] == self.hidden
        if self.strict:
            assert x.dtype == torch.bfloat16
            assert x.shape[1] % 256 == 0, "Invalid hidden"

    def _chosen(self, ids: Tensor, num_experts: int) -> Tensor:
        assert num_experts % self.size == 0, "every rank holds the same number of experts"
        assert ids.dtype == self.id_dtype
        assert ids.is_contiguous()
        assert ids.shape[1] <= min(32, self.num_topk)
        assert ((ids >= -1) & (ids < num_experts)).all()
        chosen = self._table(torch.ones(ids.shape), ids, num_experts)
        assert (chosen <= 1).all(), "a token selects an expert once"
        return chosen.bool()

    @staticmethod
    def _table(values_TK: Tensor, ids: Tensor, num_experts: int) -> Tensor:
        table = torch.zeros(ids.shape[0], num_experts + 1)
        return table.scatter_add_(1, torch.where(ids < 0, num_experts, ids).long(), values_TK)[:, :-1].contiguous()

    @staticmethod
    def _results(made: list[Tensor | None], later: bool) -> tuple[list[Tensor | None], EventOverlap]:
        if not later:
            return made, EventOverlap(None)
        shown = [None if each is None else torch.full_like(each, float("nan")) for each in made]

        def finish() -> None:
            for seen, each in zip(shown, made, strict=True):
                if seen is not None and each is not None:
                    seen.copy_(each)

        return shown, EventOverlap(finish)


@contextmanager
def as_package(buffer: type, **names: Any) -> Iterator[None]:
    """Replaces the package by a module `deep_ep` with the class `buffer`, and pretends to have a GPU for it."""
    module = SimpleNamespace(**{buffer.__name__: buffer}, **names)
    with patch.dict(sys.modules, deep_ep=module), patch("torch.cuda.get_device_capability", return_value=(9, 0)):  # pyright: ignore
        yield


@contextmanager
def deep_ep(*, strict: bool = True, id_dtype: torch.dtype = torch.int64) -> Iterator[None]:
    """Makes `import deep_ep` import this stand-in."""
    with (
        patch.object(ElasticBuffer, "strict", strict),
        patch.object(ElasticBuffer, "id_dtype", id_dtype),
        as_package(ElasticBuffer, topk_idx_t=id_dtype),
    ):
        yield
