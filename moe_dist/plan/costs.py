"""Computes how many seconds each part of a micro-batch takes on one rank, from FLOPs, bytes and a machine's rates. Imports
no torch.

The seconds of compute are FLOPs (`moe_dist.plan.flops`) divided by the rate of a matrix product, plus bytes divided by the
copy rate. On a GPU the host launches operations while the GPU computes, so the longer of compute time and launch time
counts. On a CPU the two times are added.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement, group_shares
from moe_dist.plan import flops, memory
from moe_dist.plan.rates import Rates
from moe_dist.plan.rows import Load
from moe_dist.plan.step_model import BACKWARD, LayerCost, Order, exchange_seconds

COUNTS_BYTES = 16  # number of bytes of counts and pair indices per row
PASSES_OF_A_ROW = 6  # reads and writes of each sent row, from packing to the sum (docs/gpu.md: bytes of an MoE layer)


@dataclass(frozen=True)
class Launches:
    """The number of operations that the host launches in forward, for each part of a layer."""

    attention: int  # for attention and its norms
    router: int  # for norm, router and dispatch plan of an MoE layer
    pack: int  # for copying rows into the order in which dispatch or combine sends them
    experts: int  # for the experts of one piece, which is a set of rows computed at once
    expert: int  # additional ones for each expert of a piece


LAUNCHES = {"cuda": Launches(25, 17, 8, 33, 0), "cpu": Launches(53, 130, 25, 7, 10)}  # on a CPU experts run in a loop


class Costs:
    """The seconds that each part of a layer takes for one rank's micro-batch."""

    def __init__(self, config: Config, placement: ExpertPlacement, rates: Rates, token_mix: Mapping[str, int]) -> None:
        self.config, self.placement, self.rates, self.model = config, placement, rates, config.model
        self.item = memory.ITEMSIZE[config.parallel.precision]
        self.tokens = config.train.micro_batch * config.data.seq_len
        share = dict(zip(config.model.moe.groups, group_shares(placement.groups, token_mix), strict=True))
        taken = flops.expected_experts(placement.groups)
        self.parts = flops.forward_flops(
            config.model, seq_len=config.data.seq_len, experts_per_token=taken, token_share=share
        )
        self.launches = LAUNCHES["cpu" if rates.cores else "cuda"]

    def _seconds(self, scale: float, flop: Any, rate: Any, num_bytes: Any, launches: Any = 0) -> Any:
        """Combines the seconds of compute, times the fitted factor `scale`, with the seconds of launches."""
        compute = scale * (flop / rate + num_bytes / self.rates.copy_rate)
        host = self.rates.scale.launch * launches * self.rates.launch
        return compute + host if self.rates.cores else np.maximum(compute, host)

    @property
    def backward(self) -> float:
        """Returns the ratio of backward's seconds to forward's. For each matrix product in forward, backward computes one
        product if the weight is frozen, and two otherwise."""
        return BACKWARD - flops.flops_left_out(self.config, self.parts) / self.parts.total

    @cached_property
    def _attention(self) -> float:
        """Returns the seconds of attention and its norms. The matrix products of attention scores run at the rate
        `Rates.attention`."""
        model, layers = self.model, self.model.num_layers
        widths = model.attention_widths
        products = 2 * sum(inputs * outputs for inputs, outputs in widths.values())
        scores = max(0.0, self.parts.attention / layers - products)
        rate = self.rates.gemm.at(self.tokens)
        heads = sum(outputs for name, (_, outputs) in widths.items() if name not in ("v", "o"))
        passes = self.item * (14 * model.hidden_dim + 4 * heads)
        flop = self.tokens * (products + scores * rate / self.rates.attention)
        return float(self._seconds(self.rates.scale.dense, flop, rate, self.tokens * passes, self.launches.attention))

    def head(self) -> float:
        """Returns the seconds of the output layer and the loss in the forward of one micro-batch."""
        product = self.tokens * self.parts.output / float(self.rates.gemm.at(self.tokens))
        logits = self.tokens * self.model.vocab_size * memory.FP32
        return self.rates.scale.dense * (product + logits / self.rates.loss)

    def dense_layer(self) -> LayerCost:
        """Returns the costs of a layer without experts."""
        flop = self.tokens * self.parts.dense_ffn / max(1, self.model.num_dense_layers)
        seconds = self._seconds(self.rates.scale.dense, flop, self.rates.gemm.at(self.tokens), 0.0)
        return LayerCost(dense=self._attention, shared=float(seconds))

    def moe_layer(self, load: Load, layer: int, order: Order) -> LayerCost:
        """Returns the costs of an MoE layer. `layer` is its index in `load`."""
        model, rates, count, scale = self.model, self.rates, len(self.model.moe_layers), self.rates.scale
        rate = rates.gemm.at(self.tokens)
        router = self._seconds(scale.dense, self.tokens * self.parts.router / count, rate, 0.0, self.launches.router)
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
        launches = pieces * (self.launches.experts + self.launches.expert * held_R)
        seconds = self._seconds(scale.experts, flop, each, moved, launches)
        own = seconds * np.divide(load.own[:, layer], pairs, out=np.zeros_like(pairs), where=pairs > 0)
        dense = self._attention + router
        sent = PASSES_OF_A_ROW / 2 * self.item * model.hidden_dim * load.sent[:, layer]
        pack = self._seconds(scale.experts, 0.0, 1.0, sent, self.launches.pack)
        if self.placement.num_ranks == 1:
            return LayerCost(dense=dense, shared=shared, own=own, others=seconds - own, pack=2 * pack)
        dispatch, ranks = self.config.parallel.dispatch, self.placement.num_ranks
        once, known = dispatch.node_size, dispatch.each_pair
        takes_part = (ranks,) if once is None else (ranks // once, once)

        def exchange(row_bytes: float) -> tuple[Any, ...]:
            return tuple(
                exchange_seconds(
                    rates,
                    min(each, rates.ranks_per_node),
                    row_bytes * hop.inside[:, layer],
                    row_bytes * hop.between[:, layer],
                )
                for each, hop in zip(takes_part, load.hops, strict=True)
            )

        return LayerCost(
            dense=dense,
            shared=shared,
            own=own,
            others=seconds - own,
            pack=pack,
            counts=0.0 if known else 2 * sum(exchange(COUNTS_BYTES)),  # counts, then the row index of each pair
            sync=0.0 if known else rates.sync,
            weights=0.0 if known else sum(exchange(memory.FP32 / order.chunks)),
            hops=exchange(model.hidden_dim * self.item / order.chunks),
        )
