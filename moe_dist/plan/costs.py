"""Seconds of the parts of a micro-batch on one rank, by FLOPs, bytes and the rates of a machine. Imports no torch.

Seconds of compute are FLOPs (`moe_dist.plan.flops`) at the rate of a product, plus bytes at the copy rate, or the host's
launches, whichever takes longer.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan import flops, memory
from moe_dist.plan.planner import group_shares
from moe_dist.plan.rates import Rates
from moe_dist.plan.rows import Load
from moe_dist.plan.step_model import LayerCost, Order, exchange_seconds

COUNTS_BYTES = 16  # a row's share of counts and pair indices
KERNELS = {"cuda": (66, 25), "cpu": (137, 60)}  # launches of an MoE layer and of attention in forward (docs/gpu.md)
PASSES_OF_A_ROW = 6  # reads and writes of a sent row, from packing to the sum (docs/gpu.md: bytes of an MoE layer)


class Costs:
    """Seconds of the parts of a layer for one rank's micro-batch."""

    def __init__(self, config: Config, placement: ExpertPlacement, rates: Rates, token_mix: Mapping[str, int]) -> None:
        self.config, self.placement, self.rates, self.model = config, placement, rates, config.model
        self.item = memory.ITEMSIZE[config.parallel.precision]
        self.tokens = config.train.micro_batch * config.data.seq_len
        share = dict(zip(config.model.moe.groups, group_shares(placement.groups, token_mix), strict=True))
        taken = flops.expected_experts(placement.groups)
        self.parts = flops.forward_flops(
            config.model, seq_len=config.data.seq_len, experts_per_token=taken, token_share=share
        )
        self.launches = KERNELS["cpu" if rates.cores else "cuda"]

    def _seconds(self, flop: Any, rate: Any, num_bytes: Any, launches: float = 0.0) -> Any:
        return np.maximum(flop / rate + num_bytes / self.rates.copy_rate, launches * self.rates.launch)

    @cached_property
    def _attention(self) -> float:
        """Attention with its norms; scores at their own rate."""
        model, layers = self.model, self.model.num_layers
        widths = model.attention_widths
        products = 2 * sum(inputs * outputs for inputs, outputs in widths.values())
        scores = max(0.0, self.parts.attention / layers - products)
        rate = self.rates.gemm.at(self.tokens)
        heads = sum(outputs for name, (_, outputs) in widths.items() if name not in ("v", "o"))
        passes = self.item * (14 * model.hidden_dim + 4 * heads)
        flop = self.tokens * (products + scores * rate / self.rates.attention)
        return self.rates.scale.dense * float(self._seconds(flop, rate, self.tokens * passes, self.launches[1]))

    def head(self) -> float:
        """Output layer and loss of one micro-batch in forward."""
        flop, words = self.tokens * self.parts.output, self.tokens * self.model.vocab_size
        return self.rates.scale.dense * float(self._seconds(flop, self.rates.gemm.at(self.tokens), 2 * words * memory.FP32))

    def dense_layer(self) -> LayerCost:
        """A layer without experts."""
        flop = self.tokens * self.parts.dense_ffn / max(1, self.model.num_dense_layers)
        return LayerCost(dense=self._attention, shared=float(self._seconds(flop, self.rates.gemm.at(self.tokens), 0.0)))

    def moe_layer(self, load: Load, layer: int, order: Order) -> LayerCost:
        """The MoE layer at index `layer` of the load."""
        model, rates, count, scale = self.model, self.rates, len(self.model.moe_layers), self.rates.scale
        rate = rates.gemm.at(self.tokens)
        router = self.tokens * self.parts.router / count / rate
        shared = scale.dense * self.tokens * (self.parts.shared + self.parts.free) / count / rate
        pairs, work = load.pairs[:, layer], load.work[:, layer]
        held_R = np.array([max(1, len(slots)) for slots in self.placement.slots])
        pieces = order.chunks * (2 if order.overlap else 1)
        flop_of_work = 0.0 if model.moe.experts.over_frozen_ffn else 6 * model.hidden_dim
        flop = flop_of_work * work + (
            pairs * self.tokens * self.parts.adapters / count / np.maximum(pairs.mean(), 1.0)
            if model.moe.experts.over_frozen_ffn
            else 0.0
        )
        moved = self.item * (model.hidden_dim * 2 * pairs + 3 * work)  # gather and sum of pairs, SwiGLU
        each = rates.grouped.at(pairs / held_R / pieces)
        seconds = scale.experts * self._seconds(flop, each, moved, pieces * self.launches[0] / 2)
        own = seconds * np.divide(load.own[:, layer], pairs, out=np.zeros_like(pairs), where=pairs > 0)
        dense = self._attention + scale.dense * router
        if self.placement.num_ranks == 1:
            return LayerCost(dense=dense, shared=shared, own=own, others=seconds - own)
        row = model.hidden_dim * self.item / order.chunks
        inside, between = load.inside[:, layer], load.between[:, layer]
        ranks = min(self.placement.num_ranks, rates.ranks_per_node)
        two_hops = self.config.parallel.dispatch.node_size is not None
        hops = (
            ((0.0 * inside, between * row), (inside * row, 0.0 * between)) if two_hops else ((inside * row, between * row),)
        )
        known = self.config.parallel.dispatch.each_pair
        counts = exchange_seconds(rates, ranks, COUNTS_BYTES * inside, COUNTS_BYTES * between)
        sent = PASSES_OF_A_ROW / 2 * self.item * model.hidden_dim * (load.sent_inside + load.sent_between)[:, layer]
        return LayerCost(
            dense=dense,
            shared=shared,
            own=own,
            others=seconds - own,
            pack=scale.experts * self._seconds(0.0, 1.0, sent, self.launches[0] / 4),
            counts=0.0 if known else 2 * counts,  # counts, then the row index of each pair
            sync=0.0 if known else rates.sync,
            hops=tuple(exchange_seconds(rates, ranks, *hop) for hop in hops),
        )
