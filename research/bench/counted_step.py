"""Prints the counts of a training step on a fake GPU as a table, beside the least possible counts. Also prints the time of
the step, computed from a GPU's rates."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from moe_dist.config.bundled import find_config
from moe_dist.errors import ResourceError
from moe_dist.plan.preflight import layout_without_data
from moe_dist.plan.rates import Rates
from research.bench.card_time import card_rates, card_time
from research.bench.card_time import table as time_table
from research.bench.least import Key, least_bytes, least_flops
from research.fake_gpu.count import count
from research.fake_gpu.fake_cuda import Work
from research.fake_gpu.fake_step import MICRO_BATCHES, Counted, scaled


@dataclass(frozen=True)
class Share:
    """Counts by part and phase. `micro_batch` has the counts that each micro-batch adds to a step, `once` the counts that
    do not depend on the number of micro-batches."""

    micro_batch: Counter[Key]
    once: Counter[Key]


def shares(counted: Counted, value: Callable[[Work], int]) -> Share:
    """Sums `value`, which is 1 or the bytes or FLOPs of an operation, over all operations."""
    found = Share(Counter(), Counter())
    for listed, number_of in ((counted.more_work, found.micro_batch), (counted.work, found.once)):
        for *key, number in listed:
            work = Work(*key)
            number_of[work.part, work.phase] += number * value(work)
    for key, number in found.micro_batch.items():
        found.once[key] -= MICRO_BATCHES * number
    return found


def leasts(counted: Counted, path: str | Path, overrides: Sequence[str]) -> tuple[dict[Key, float], dict[Key, float]]:
    """Returns the fewest bytes and FLOPs of one micro-batch of the counted configuration, by part and phase. Returns empty
    mappings for a model with LoRA, shared experts or mixture of depths, which `least.py` does not support."""
    config = scaled(overrides, str(find_config(path)), counted.ranks)
    if config.model.has_adapters or config.model.moe.shared_ffn_dim or config.model.depth_layers:
        return {}, {}
    layout = layout_without_data(config)
    return least_bytes(config, layout, counted.rank), least_flops(config, layout)


def table(counted: Counted, leasts: tuple[dict[Key, float], dict[Key, float]] = ({}, {})) -> Table:
    """Returns a table of the counts that one more micro-batch adds to a step, and of the kernels and bytes that a step has
    only once. Counts of attention and of MoE layers are per layer. The number of collectives is half the number in a step
    of two micro-batches. Memory is in GB. `kept` is the bytes that a part allocated minus the bytes that it freed. `live`
    is the largest number of bytes of all tensors while the part ran.

    Args:
        leasts: The fewest bytes and FLOPs, shown beside the counted bytes and FLOPs.
    """
    made = Table(title=f"{counted.config}: rank {counted.rank} of {counted.ranks}, {counted.layers['attention']} layers")
    columns = (
        "part",
        "phase",
        "kernels",
        "once",
        "GB",
        "least GB",
        "once",
        "TFLOP",
        "least",
        "kept",
        "live",
        "collectives",
    )
    for column in columns:
        made.add_column(column, justify="left" if column in ("part", "phase", "collectives") else "right")
    flops = shares(counted, lambda work: work.flops).micro_batch
    launched, moved = shares(counted, lambda work: 1), shares(counted, lambda work: work.num_bytes)
    for part, phase in sorted(launched.once.keys() | launched.micro_batch.keys()):
        key, layers = (part, phase), counted.layers.get(part)
        times = (MICRO_BATCHES if phase != "step" else 1) * (layers or 1)
        collectives = {
            name.split()[2]: number / times
            for name, number in counted.collectives.items()
            if name.startswith(f"{part} {phase} ")
        }
        text = ", ".join(f"{number:g} {name.strip('_')}" for name, number in collectives.items())
        tera = flops[key] / (layers or 1) / 1e12
        least_gb, least_tera = (
            f"{each[key] / (layers or 1) / unit:.2f}" if key in each else ""
            for each, unit in zip(leasts, (1e9, 1e12), strict=True)
        )
        number, once = (each[key] / (layers or 1) for each in (launched.micro_batch, launched.once))
        gb, gb_once = (each[key] / (layers or 1) / 1e9 for each in (moved.micro_batch, moved.once))
        counts = (f"{number:.0f}", f"{once:.0f}", f"{gb:.2f}", "" if phase == "step" else least_gb)
        kept, live, _ = counted.memory.get(f"{part} {phase}", (0, 0, 0))
        memory = (f"{kept / times / 1e9:.2f}", f"{live / 1e9:.2f}")
        rest = (f"{gb_once:.2f}", f"{tera:.2f}" if tera else "", least_tera, *memory, text)
        made.add_row(f"{part}, a layer" if layers else part, phase, *counts, *rest)
    for name, noted in (("host waits for a value", counted.syncs), ("host waits for a copy", counted.copies)):
        made.add_section()
        for key, number in noted.items():
            words = key.partition(" ")
            made.add_row(name, words[0], f"{number}", *[""] * 8, words[2] + ", a step")
    return made


def refuse_what_cannot_fit(counted: Counted, rates: Rates) -> None:
    """Raises ResourceError if the live tensors of a step take more bytes than the card has. The error names the layer with
    the most live bytes. If no layer exceeds the card's memory, it names the part that does."""
    over = {place: each for place, each in counted.memory.items() if each[1] > rates.memory}
    in_layers = {place: each for place, each in over.items() if place.partition(" ")[0] in counted.layers}
    if over:
        place, (_, most, layer) = max((in_layers or over).items(), key=lambda each: each[1][1])
        part, _, phase = place.partition(" ")
        where = f"layer {layer} ({part}, {phase})" if in_layers else f"{part}, {phase}"
        raise ResourceError(
            f"{counted.config} on {counted.ranks} ranks: in {where} the tensors of rank {counted.rank} take "
            f"{most / 1e9:.1f} GB, and {rates.card} has {rates.memory / 1e9:.0f}; take more --ranks, a smaller "
            "train.micro_batch, or parallel.recompute=block; without --card the counts are printed all the same"
        )


def report(path: Path, ranks: int, overrides: Sequence[str], *, card: str | None) -> list[Table]:
    """Returns tables of a step's counts. If `card` is given, also returns tables of the step's time by the card's rates.

    Raises:
        ConfigError, ResourceError: `count` raises them, the card's rates are unknown, or a layer does not fit on the card.
    """
    rates = None if card is None else card_rates(card)
    counted = count(path, ranks, overrides)
    if rates is not None:
        refuse_what_cannot_fit(counted, rates)
    tables = [table(counted, leasts(counted, path, overrides))]
    if rates is not None:
        tables.append(time_table(card_time(counted, str(find_config(path)), overrides, rates)))
    return tables
