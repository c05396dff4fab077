"""Estimates the step time, exchanged bytes and memory of a layout. Imports no torch.

Sums of gradients and gathers of parameters over data-parallel ranks run while dispatch and combine leave the network free.
If they need more time, they prolong the step. The estimate assumes that EP groups wait for each other in each micro-batch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan import flops, memory
from moe_dist.plan.costs import Costs
from moe_dist.plan.rates import GUIDE, Mark, Rates, weakest
from moe_dist.plan.rows import EXCHANGES, Expected, Load, Traced, Wire, group_starts, ranks_sharing_a_node
from moe_dist.plan.step_model import Order, Played, collective_seconds, expected_longest, micro_batch, play

LIBRARIES = 1.5e9  # number of bytes of CUDA context, NCCL and kernels' scratch space, which `memory` does not count
SLACK = 0.05  # additional memory that the allocator loses between blocks, as a fraction of the tensors' memory
SLOWED = 20 / 132  # fraction of a GPU that a collective occupies and compute lacks (DeepSeek-V3 report, section 3.2.2)


@dataclass(frozen=True)
class Estimate:
    """The planner's estimates of one layout.

    Attributes:
        seconds: Seconds of a step, the sum of four parts. `busy`: compute and host syncs of the average rank. `imbalance`:
            the wait for the busiest rank. `exchange`: the time of exchanges during which nothing is computed. `tail`: sums,
            gathers and optimizer.
        wire: Seconds per step in which the rank that sends the most rows exchanges rows, also while it computes.
        bytes_inside, bytes_between: Payload bytes that all ranks together exchange per step, inside nodes and between
            nodes.
        memory: Bytes on the rank that needs the most memory, at the quantiles 0.5, 0.95 and 0.99 over micro-batches.
        out_of_memory: Probability that any rank runs out of memory in a step.
        mark, rows_mark: Certainty (`moe_dist.plan.rates.MARKS`) of the times, and of bytes and memory.
    """

    config: Config
    placement: ExpertPlacement
    seconds: float
    busy: float
    imbalance: float
    exchange: float
    tail: float
    wire: float
    bytes_inside: float
    bytes_between: float
    memory: tuple[float, float, float]
    out_of_memory: float
    mark: Mark
    rows_mark: Mark

    @property
    def gpus(self) -> int:
        return self.config.parallel.ep * self.config.parallel.edp

    @property
    def tokens_per_second(self) -> float:
        return self.config.train.global_batch * self.config.data.seq_len / self.seconds

    @property
    def name(self) -> str:
        parallel, dispatch = self.config.parallel, self.config.parallel.dispatch
        chunks = getattr(dispatch, "chunks", 1)
        extra = [f"chunks {chunks}"] if chunks > 1 else []
        extra += ["overlap"] if getattr(dispatch, "overlap", False) else []
        gather = f"/{parallel.fsdp_gather}" if parallel.data == "fsdp2" else ""
        words = (f"ep {parallel.ep} x edp {parallel.edp}", self.config.placement.policy, dispatch.kind, *extra)
        return f"{', '.join(words)}, {parallel.data}{gather}, {parallel.recompute}, mb {self.config.train.micro_batch}"


class LayoutEstimator:
    """Estimates layouts. Loads, times and memory that several layouts share are computed only once. Loads come from
    `source`, as expected loads or from a trace."""

    def __init__(self, rates: Rates, source: Expected | Traced, token_mix: Mapping[str, int], most_bytes: float) -> None:
        self.rates, self.source, self.token_mix, self.most_bytes = rates, source, token_mix, most_bytes
        self._loads: dict[Any, Load] = {}
        self._played: dict[Any, Played] = {}
        self._memory: dict[Any, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def take(self, rates: Rates) -> None:
        """Replaces the rates by other rates of the same machine. Rows and memory that were already computed stay valid."""
        self.rates = rates
        self._played.clear()

    def estimate(self, config: Config, placement: ExpertPlacement) -> Estimate:
        """Estimates one layout."""
        parallel, train = config.parallel, config.train
        world = parallel.ep * parallel.edp
        if world > self.rates.ranks_per_node and self.rates.between is None:
            raise ConfigError(
                f"between=null: {world} GPUs need {-(-world // self.rates.ranks_per_node)} nodes, but the rates of "
                f"{self.rates.machine} have no exchange between nodes; add `between` to the rates file, or take at most "
                f"--gpus {self.rates.ranks_per_node}",
                see=GUIDE,
            )
        times = train.global_batch // (train.micro_batch * world)
        starts = group_starts(parallel.ep, parallel.edp, self.rates.ranks_per_node)
        loads = {first: self._load(config, placement, first) for first in starts}
        plays = {first: self._play(config, placement, first) for first in starts}
        micros = {first: expected_longest(plays[first].seconds_S, groups) for first, groups in starts.items()}
        slowest = max(micros, key=micros.__getitem__)  # the step waits for the slowest EP groups
        load, played, micro = loads[slowest], plays[slowest], micros[slowest]
        busy_S, busiest_S = played.busy_SR.mean(1), played.busy_SR.max(1)
        tail = self._tail(config, placement, played, times)
        bytes_row = config.model.hidden_dim * memory.ITEMSIZE[parallel.precision]
        exchanges = EXCHANGES[parallel.recompute] * times * bytes_row * len(config.model.moe_layers) / load.rows.shape[1]

        def sent(field: str) -> float:
            hops = ((groups, getattr(hop, field)) for at, groups in starts.items() for hop in loads[at].hops)
            return sum(groups * float(rows.sum((1, 2)).mean()) for groups, rows in hops)

        memories, chance = self._memory_of(config, placement, load, times)
        mean_busy, mean_busiest = float(busy_S.mean()), float(busiest_S.mean())
        return Estimate(
            config=config,
            placement=placement,
            seconds=times * micro + tail,
            busy=times * mean_busy,
            imbalance=times * (mean_busiest - mean_busy),
            exchange=times * (micro - mean_busiest),
            tail=tail,
            wire=times * float(played.wire_S.mean()),
            bytes_inside=exchanges * sent("sent_inside"),
            bytes_between=exchanges * sent("sent_between"),
            memory=memories,
            out_of_memory=chance,
            mark=weakest(self.rates.source, load.mark, "fitted" if self.rates.source == "fitted" else "extrapolated"),
            rows_mark=load.mark,
        )

    def _load(self, config: Config, placement: ExpertPlacement, first: int) -> Load:
        dispatch, tokens = config.parallel.dispatch, config.train.micro_batch * config.data.seq_len
        wire = Wire(self.rates.ranks_per_node, dispatch.node_size, dispatch.each_pair, first)
        key = (placement.slots, wire, tokens)
        if key not in self._loads:
            layers = len(config.model.moe_layers)
            self._loads[key] = self.source.load(placement, wire, tokens=tokens, layers=layers)
        return self._loads[key]

    def _play(self, config: Config, placement: ExpertPlacement, first: int) -> Played:
        parallel, dispatch, load = config.parallel, config.parallel.dispatch, self._load(config, placement, first)
        # All ranks of a node share its cores. The simulation has one EP group, which gets its proportional part of them.
        node = min(parallel.ep * parallel.edp, self.rates.ranks_per_node)
        cores = None if self.rates.cores is None else self.rates.cores * min(1.0, parallel.ep / node)
        key = (placement.slots, dispatch, parallel.recompute, config.train.micro_batch, cores, first)
        if key not in self._played:
            cost = Costs(config, placement, self.rates, self.token_mix)
            order = Order(
                getattr(dispatch, "overlap", False),
                getattr(dispatch, "chunks", 1),
                parallel.recompute,
                cost.backward,
                self.rates.scale.recompute,
            )
            draws, shown, ranks = load.rows.shape
            moe = [cost.moe_layer(load, layer, order) for layer in range(shown)]
            at = iter(range(len(config.model.moe_layers)))
            layers = [
                moe[next(at) % shown] if layer in config.model.moe_layers else cost.dense_layer()
                for layer in range(config.model.num_layers)
            ]
            events = micro_batch(layers, cost.head(), order)
            self._played[key] = play(events, draws, ranks, cores=cores)
        return self._played[key]

    def _tail(self, config: Config, placement: ExpertPlacement, played: Played, times: int) -> float:
        """Returns the seconds that gradient sums, parameter gathers and the optimizer add to a step. These are the seconds
        in which nothing is computed, plus the seconds by which sums and gathers slow down simultaneous compute."""
        parallel, rates, world = config.parallel, self.rates, config.parallel.ep * config.parallel.edp
        held = {g.name: max(len(placement.local_experts(r, g)) for r in range(parallel.ep)) for g in placement.groups}
        parts, trained = flops.parameters(config.model, experts_held=held), memory.trained_parts(config, held)
        experts = parts.experts + flops.own_adapters(config.model, held)
        spans = (
            (parts.total - experts, trained.router + trained.dense, 1, world),
            (experts, trained.experts, parallel.ep, parallel.edp),
        )
        summed = gathered = 0.0
        for number, with_gradient, stride, ranks in spans:
            of_node = ranks_sharing_a_node(stride, ranks, rates.ranks_per_node)
            ring, item = (ranks - 1) / ranks, memory.ITEMSIZE[parallel.precision]
            gathered += collective_seconds(rates, ring * number * item, ranks, of_node)
            summed += collective_seconds(rates, ring * with_gradient * memory.FP32, ranks, of_node)
        # If ranks share cores, no collective is hidden, because it takes a core from another rank's compute.
        free = 0.0 if rates.cores else max(0.0, float((played.seconds_S - played.wire_S).mean()))
        if parallel.data != "fsdp2":
            pairs = [(2 * summed, free * 2 / 3)]  # an all-reduce sends each byte twice, during the last backward
        elif parallel.fsdp_gather == "step":
            pairs = [(gathered, free / 3), (summed, free * 2 / 3)]
        else:
            pairs = [(2 * gathered + summed, free)] * times  # FSDP2 gathers in forward and again in backward
        # Nothing is computed during the first parameter gather and the last gradient sum.
        uncovered = sum(max(each - beside, each / config.model.num_layers) for each, beside in pairs)
        slowed = SLOWED * sum(min(each, beside) for each, beside in pairs)
        state = max(memory.trained_parameters(config, placement, rank=rank) for rank in range(parallel.ep))
        optimizer = 28 * state / rates.copy_rate  # AdamW reads four fp32 numbers of each parameter and writes three
        return uncovered + slowed + optimizer + rates.scale.step

    def _memory_of(
        self, config: Config, placement: ExpertPlacement, load: Load, times: int
    ) -> tuple[tuple[float, float, float], float]:
        """Returns the bytes on the rank that needs the most memory, at three quantiles, and the probability that a step
        runs out of memory."""
        parallel, tokens = config.parallel, config.train.micro_batch * config.data.seq_len
        key = (placement.slots, parallel, config.train.micro_batch)
        rows_R, pairs_R = load.rows.mean((0, 1)) / tokens, load.pairs.mean((0, 1)) / tokens
        if key not in self._memory:
            self._memory[key] = _linear_memory(config, placement, rows_R, pairs_R)
        base_R, row_R, pair_R = self._memory[key]
        # An exchange has buffers for rows that are computed, sent and returned (docs/parallelism.md). Only the layer with
        # the most rows matters.
        buffer = config.model.hidden_dim * memory.ITEMSIZE[parallel.precision]
        buffers_R = buffer * ((load.rows + load.sent).max(1).mean(0) + tokens)
        mean_R = (1 + SLACK) * (base_R + rows_R * row_R + pairs_R * pair_R + buffers_R) + LIBRARIES
        spread_R = (1 + SLACK) * (load.spread[0] * row_R + load.spread[1] * pair_R) / tokens
        quantiles = [float((mean_R + z * spread_R).max()) for z in (0.0, 1.645, 2.326)]
        left_R = (self.most_bytes - mean_R) / np.maximum(spread_R, 1.0)
        chance_R = np.array([0.5 * math.erfc(left / math.sqrt(2)) for left in left_R])
        micro_batches = parallel.edp * times
        safe = float(np.prod((1 - np.minimum(chance_R, 1.0)) ** micro_batches))
        return (quantiles[0], quantiles[1], quantiles[2]), 1 - safe


def _linear_memory(
    config: Config, placement: ExpertPlacement, rows_R: np.ndarray, pairs_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns three arrays [R] from which `_memory_of` computes each rank's memory: bytes that depend on neither rows nor
    pairs, bytes for one row per token, and bytes for one pair per token. The sum is exact for the means `rows_R` and
    `pairs_R` per token, and for up to a tenth of a row or pair more. For other numbers it is approximate, because some
    terms of the memory are maxima. Ranks with equal numbers of experts, rows and pairs share one result."""
    made: dict[Any, tuple[float, float, float]] = {}
    found = []
    for rank, (rows, pairs) in enumerate(zip(rows_R.tolist(), pairs_R.tolist(), strict=True)):
        held = tuple(len(placement.local_experts(rank, group)) for group in placement.groups)
        key = held, round(rows, 3), round(pairs, 3)
        if key not in made:
            mean, row, pair = (
                memory.rank_memory(config, placement, rank=rank, rows=rows + more, pairs=pairs + again).total
                for more, again in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1))
            )
            row, pair = 10 * (row - mean), 10 * (pair - mean)
            made[key] = mean - rows * row - pairs * pair, row, pair
        found.append(made[key])
    base_R, row_R, pair_R = np.array(found).T
    return base_R, row_R, pair_R
