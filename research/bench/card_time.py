"""Computes the time of a training step from counts of the step's operations and from a GPU's rates. Nothing is timed.

An operation takes FLOPs / (rate of this kind of operation), or bytes / (rate of a copy), whichever is longer. Operations
run one after the other. A part of the model takes the time of its operations, or the time in which the host launches its
kernels, whichever is longer. An exchange takes latency + bytes / rate, and does not slow simultaneous computation. The
order of exchanges is the order of the dispatcher or of two-batch overlap (`moe_dist.plan.step_model`). While no exchange
runs, gathers of parameters overlap with forward, and sums of gradients overlap with backward. With two-batch overlap,
gathers and sums overlap with no computation. All ranks take equal times.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from rich.table import Table

from moe_dist.config.cluster import load_cluster
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.placement.placement import group_shares
from moe_dist.plan import flops
from moe_dist.plan.preflight import layout_without_data
from moe_dist.plan.rates import Rates, published_rates
from moe_dist.plan.step_model import (
    BACKWARD,
    LayerCost,
    Order,
    collective_seconds,
    exchange_seconds,
    micro_batch,
    play,
)
from research.bench.halves import micro_batch_in_halves
from research.bench.least import Key, masked_scores
from research.fake_gpu.fake_cuda import Sent, Work
from research.fake_gpu.fake_step import MICRO_BATCHES, Counted, scaled

CLUSTER = "h100_infiniband"  # cluster file with the number of GPUs of a node and the rate between nodes
FP32_SHARE = 1 / 16  # rate of fp32 matrix products / rate of bf16 products, without TF32
GATHERS, SUMS = "_allgather_base_", "_reduce_scatter_base_"


@dataclass(frozen=True)
class CardTime:
    """The times of one rank, in seconds.

    Attributes:
        parts, launches: Seconds of a micro-batch by part and phase. `parts` has the seconds of the operations on the
            device, `launches` the seconds in which the host launches them.
        kinds: Seconds of a micro-batch on the device, by kind of operation.
        exchange, sync: Seconds of a micro-batch in exchanges, and seconds in which the device is idle after host syncs.
        micro_batch: Seconds of a micro-batch.
        once: Seconds of the work that a step does once, not in each micro-batch, such as the optimizer's update.
        gathers, sums, uncovered: Seconds of a step in gathers of parameters, in sums of gradients, and in gathers and sums
            that overlap with no computation.
        model_flops, masked: FLOPs (not seconds) of a step. `masked` has the FLOPs of masked attention scores. `model_flops`
            leaves these out, and leaves out recomputation.
    """

    rates: Rates
    micro_batches: int
    parts: dict[Key, float]
    launches: dict[Key, float]
    kinds: dict[str, float]
    exchange: float
    sync: float
    micro_batch: float
    once: float
    gathers: float
    sums: float
    uncovered: float
    tokens: int
    model_flops: float
    masked: float
    peak: float

    @property
    def seconds(self) -> float:
        return self.micro_batches * self.micro_batch + self.once + self.uncovered

    def mfu(self, *, all_scores: bool = False) -> float:
        """Returns the model's FLOPs/s divided by the card's peak FLOPs/s. With `all_scores`, also counts the attention
        scores for positions after a token's own position, as perf/mfu does."""
        return (self.model_flops + all_scores * self.masked) / self.seconds / self.peak


def card_rates(card: str) -> Rates:
    """Returns rates from a GPU's data sheet, and the rate between nodes from the cluster file `CLUSTER`.

    Raises:
        ConfigError: from `published_rates`.
    """
    cluster, peak = load_cluster(CLUSTER, {}), peak_tflops(card)
    assert cluster.between_gbytes is not None
    peak_flops = None if peak is None else peak * 1e12
    return published_rates(card, peak_flops, ranks_per_node=cluster.gpus.per_node, between=cluster.between_gbytes * 1e9)


def operation_seconds(work: Work, rates: Rates) -> float:
    """Returns the seconds of one operation on the device."""
    kind, _, precision = work.kind.partition(" ")
    by_kind = {"gemm": rates.gemm.at, "grouped": rates.grouped.at, "attention": lambda _: rates.attention}
    computing = work.flops / float(by_kind[kind](work.rows)) if kind in by_kind else 0.0
    return max(computing / (FP32_SHARE if precision else 1.0), work.num_bytes / rates.copy_rate)


def card_time(counted: Counted, path: str, overrides: Sequence[str], rates: Rates) -> CardTime:
    """Returns the time of a step with all micro-batches of the configuration. `counted` has the counts of a step with only
    `MICRO_BATCHES` micro-batches."""
    whole, config = load_config(path, overrides), scaled(overrides, path, counted.ranks)
    times = max(1, whole.train.global_batch // (whole.train.micro_batch * counted.ranks))
    more, two = _works(counted.more_work), _works(counted.work)
    parts, kinds, launches = defaultdict(float), defaultdict(float), defaultdict(float)
    for work, number in more:
        seconds = number * operation_seconds(work, rates)
        parts[work.part, work.phase] += seconds
        kinds[work.kind] += seconds
        launches[work.part, work.phase] += number * rates.launch
    once = sum(number * operation_seconds(work, rates) for work, number in two) - MICRO_BATCHES * sum(parts.values())
    sync = rates.sync * sum(n for name, n in counted.syncs.items() if name.startswith("forward")) / MICRO_BATCHES
    ring = {name: _ring_seconds(counted, config, rates, name, times) for name in (GATHERS, SUMS)}
    longest = {key: max(seconds, launches[key]) for key, seconds in parts.items()}
    grouped, dispatch = _grouped(more, rates), config.parallel.dispatch
    order = Order(getattr(dispatch, "overlap", False), getattr(dispatch, "chunks", 1))  # the counts include recomputation
    layers = {phase: _layers(counted, config, longest, grouped, rates, phase, sync) for phase in ("forward", "backward")}
    head = sum(each for (part, _), each in longest.items() if part in ("model", "loss")) / (1 + BACKWARD)
    if config.parallel.two_batch_overlap:
        halves = {phase: [_half(each) for each in costs] for phase, costs in layers.items()}
        events = micro_batch_in_halves(halves["forward"], head, halves["backward"])
    else:
        events = micro_batch(layers["forward"], head, order, layers["backward"])
    played = play(events, 1, 1)
    seconds, free = float(played.seconds_S[0]), float((played.seconds_S - played.wire_S)[0])
    if config.parallel.two_batch_overlap:  # all gathers run before the first layer, all sums after the last layer
        free = 0.0
    covers = {GATHERS: free / (1 + BACKWARD), SUMS: free * BACKWARD / (1 + BACKWARD)}
    tokens, layout = times * config.train.micro_batch * config.data.seq_len, layout_without_data(config)
    shares = dict(zip((group.name for group in layout.groups), group_shares(layout.groups, {}), strict=True))
    masked, peak = 3 * tokens * masked_scores(config), peak_tflops(rates.card)
    assert peak is not None
    return CardTime(
        rates=rates,
        micro_batches=times,
        parts=dict(parts),
        launches=dict(launches),
        kinds=dict(kinds),
        exchange=sum(each for phase in layers for each, _ in _exchanges(counted, config, rates, phase)),
        sync=sync,
        micro_batch=seconds,
        once=once,
        gathers=ring[GATHERS],
        sums=ring[SUMS],
        uncovered=sum(max(0.0, ring[name] - covers[name]) for name in ring),
        tokens=tokens,
        model_flops=tokens * flops.model_flops_per_token(flops.expected_experts(layout.groups), shares, config=config)
        - masked,
        masked=masked,
        peak=peak * 1e12,
    )


def _works(listed: list[list[Any]]) -> list[tuple[Work, int]]:
    return [(Work(*each[:-1]), each[-1]) for each in listed]


def _grouped(works: list[tuple[Work, int]], rates: Rates) -> dict[str, float]:
    """Returns the seconds of the experts' matrix products, by phase."""
    found: dict[str, float] = {"forward": 0.0, "backward": 0.0}
    for work, number in works:
        if work.kind == "grouped":
            found[work.phase] += number * operation_seconds(work, rates)
    return found


def _exchanges(counted: Counted, config: Config, rates: Rates, phase: str) -> Iterator[tuple[float, bool]]:
    """Yields the seconds of each exchange in a phase of a micro-batch, and whether it sends counts (integers). The host
    waits for counts. All ranks of the EP group get the same number of token rows."""
    ep = config.parallel.ep
    ranks = min(ep, rates.ranks_per_node)
    inside = (ranks - 1) / max(1, ep - 1)
    for *key, number in counted.more_sent:
        sent = Sent(*key)
        if sent.name.startswith("alltoall") and sent.phase == phase:
            seconds = exchange_seconds(rates, ranks, inside * sent.num_bytes, (1 - inside) * sent.num_bytes)
            yield number * float(seconds), sent.whole


def _layers(
    counted: Counted,
    config: Config,
    seconds: dict[Key, float],
    grouped: dict[str, float],
    rates: Rates,
    phase: str,
    sync: float,
) -> list[LayerCost]:
    """Returns each layer's costs in forward or in backward. Divides seconds of compute in backward by `BACKWARD`, because
    `micro_batch` multiplies seconds of compute by `BACKWARD`."""
    number, ep, times = counted.layers, config.parallel.ep, 1.0 if phase == "forward" else BACKWARD
    exchanges = list(_exchanges(counted, config, rates, phase))
    dense = seconds["attention", phase] / number["attention"] / times
    experts = grouped[phase] / number["moe"]
    rest = seconds["moe", phase] / number["moe"] - experts
    moe = LayerCost(
        dense=dense,
        own=experts / ep / times,
        others=experts * (ep - 1) / ep / times,
        pack=rest / 2 if exchanges else rest / times,  # half before an exchange, half after
        counts=sum(each for each, whole in exchanges if whole) / number["moe"],
        sync=sync / number["moe"],
        hops=(sum(each for each, whole in exchanges if not whole) / number["moe"] / 2,) if exchanges else (),
    )
    ffn = LayerCost(dense=dense, shared=seconds.get(("ffn", phase), 0.0) / max(1, number.get("ffn", 0)) / times)
    return [moe if layer in config.model.moe_layers else ffn for layer in range(config.model.num_layers)]


def _half(layer: LayerCost) -> LayerCost:
    """Returns the costs of a layer for half a micro-batch. `layer` has the costs for the whole micro-batch."""
    each = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return LayerCost(
        **{name: tuple(hop / 2 for hop in cost) if name == "hops" else cost / 2 for name, cost in each.items()}
    )


def _ring_seconds(counted: Counted, config: Config, rates: Rates, name: str, times: int) -> float:
    """Returns the seconds of a step's collectives called `name`, which gather parameters or sum gradients along rings."""
    parallel = config.parallel
    together = max(1, min(rates.ranks_per_node // parallel.ep, parallel.edp))  # ranks of an edp group on the same node
    found = 0.0
    for listed, weight in ((counted.sent, 1), (counted.more_sent, times - MICRO_BATCHES)):
        for *key, number in listed:
            sent = Sent(*key)
            of_node = rates.ranks_per_node if sent.ranks == counted.ranks else together
            if sent.name == name:
                found += weight * number * collective_seconds(rates, sent.num_bytes, sent.ranks, of_node)
    return found


def table(time: CardTime) -> Table:
    """Returns a table of the seconds of each part of a step, with the assumed rates."""
    rates = time.rates
    made = Table(title=f"A step of {time.micro_batches} micro-batches on {rates.card}, on paper", title_justify="left")
    for column in ("part", "phase", "ms", "ms of launches"):
        made.add_column(column, justify="left" if column in ("part", "phase") else "right")
    for (part, phase), seconds in sorted(time.parts.items()):
        made.add_row(part, phase, f"{seconds * 1e3:.1f}", f"{time.launches[part, phase] * 1e3:.1f}")
    made.add_section()
    for kind, seconds in sorted(time.kinds.items()):
        made.add_row(f"of these {'all without products' if kind == 'copy' else kind}", "", f"{seconds * 1e3:.1f}")
    made.add_section()
    free = {"exchanges": time.exchange, "host syncs": time.sync, "micro-batch": time.micro_batch}
    step = {"once": time.once, "gathers of parameters": time.gathers, "sums of gradients": time.sums}
    for name, seconds in free.items():
        made.add_row(name, "micro-batch", f"{seconds * 1e3:.1f}")
    for name, seconds in {**step, "gathers and sums that nothing covers": time.uncovered, "step": time.seconds}.items():
        made.add_row(name, "step", f"{seconds * 1e3:.1f}")
    made.caption = (
        f"MFU {time.mfu():.1%}; {time.mfu(all_scores=True):.1%} if attention counts positions after a token's own, as "
        f"perf/mfu does. {time.tokens / time.seconds:,.0f} tokens/s per GPU. {assumptions(rates)}"
    )
    made.caption_justify = "left"
    return made


def assumptions(rates: Rates) -> str:
    """Returns a sentence with the rates from which a time was computed."""
    sizes = (512, 1024, 2048, 4096)
    dense, grouped = (
        ", ".join(f"{float(curve.at(size)) / 1e12:.0f}" for size in sizes) for curve in (rates.gemm, rates.grouped)
    )
    far = "" if rates.between is None else f", {rates.between.bytes_per_second / 1e9:.0f} to other nodes"
    return (
        f"Rates ({rates.machine}): products of {', '.join(map(str, sizes))} rows {dense} TFLOP/s, of as many rows of each "
        f"expert {grouped}, fp32 {FP32_SHARE:g} of these, attention {rates.attention / 1e12:.0f}; copies "
        f"{rates.copy_rate / 1e12:.2f} TB/s; exchanges {rates.inside[-1].bytes_per_second / 1e9:.0f} GB/s in a node{far}; "
        f"{rates.launch * 1e6:.0f} us a launch, hidden under longer work; {rates.sync * 1e6:.0f} us a host sync."
    )
