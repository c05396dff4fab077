"""Defines the rates of a machine that the step model needs: of products, copies, launches and exchanges. Imports no torch.

`moe-dist calibrate` measures the rates and writes them to a file. `docs/planning.md` explains the fields and lists the
sources of published rates.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.base.section import NonNegative, Section, Violation
from moe_dist.config.partial import draft
from moe_dist.config.yaml_text import dump_yaml, read_mapping
from moe_dist.errors import ConfigError

GUIDE = "docs/planning.md"
Mark = Literal["measured", "fitted", "extrapolated"]
MARKS: tuple[Mark, ...] = ("measured", "fitted", "extrapolated")  # from the most to the least certain


def weakest(*marks: Mark) -> Mark:
    """Returns the least certain of the marks. A number computed from several marked numbers gets this mark."""
    return max(marks, key=MARKS.index)


class CurveSection(Section):
    """A rate as a function of size: interpolated logarithmically between the given sizes, and constant beyond them."""

    sizes: tuple[PositiveFloat, ...] = Field(description="Rows of a product, rising.")
    rates: tuple[PositiveFloat, ...] = Field(description="FLOP/s at each size.")

    def violations(self) -> Iterator[Violation]:
        if len(self.sizes) != len(self.rates) or not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            problem = f"sizes={list(self.sizes)}, rates={list(self.rates)}: need one rate for each size, and rising sizes"
            yield Violation(("sizes", "rates"), f"{problem}; measure again with moe-dist calibrate")

    def at(self, size: np.ndarray | float) -> np.ndarray:
        """Returns the rate at each size in an array of any shape. A size below 1 counts as 1."""
        logs = np.interp(np.log(np.maximum(size, 1.0)), np.log(self.sizes), np.log(self.rates))
        return np.exp(logs)


class LinkSection(Section):
    """The time of an exchange of `ranks` ranks: latency + bytes of the busiest rank / bytes_per_second (alpha-beta
    model)."""

    ranks: PositiveInt = Field(description="Number of ranks that exchange at the same time.")
    latency: NonNegative = Field(description="Seconds of an exchange without rows.")
    bytes_per_second: PositiveFloat = Field(description="Bytes that a rank sends per second while it receives as many.")


class ScaleSection(Section):
    """Factors and constant seconds that are fitted to measured steps. Without a fit, factors are 1 and seconds are 0."""

    dense: PositiveFloat = Field(default=1.0, description="Measured seconds of all but experts, over those by the rates.")
    experts: PositiveFloat = Field(default=1.0, description="Measured seconds of experts, over those by the rates.")
    launch: PositiveFloat = Field(default=1.0, description="Measured seconds of host launches, over those by the rates.")
    recompute: PositiveFloat = Field(default=1.0, description="Seconds of a repeated forward, over those of the first.")
    exchange: PositiveFloat = Field(default=1.0, description="Measured seconds of exchanges, over those by the rates.")
    step: NonNegative = Field(default=0.0, description="Seconds of a step outside its micro-batches.")


class Rates(Section):
    """The rates of one machine."""

    machine: str = Field(description="Name of the machine on which the rates hold.")
    card: str = Field(description="Name of the GPU or CPU.")
    source: Mark = Field(description="Whether rates are measured, fitted to measured steps, or from data sheets.")
    memory: PositiveFloat = Field(description="Bytes of memory of a rank.")
    gemm: CurveSection = Field(description="Products with one weight.")
    grouped: CurveSection = Field(description="Products of several experts at once; a size is the rows of one expert.")
    attention: PositiveFloat = Field(description="FLOP/s of the products of attention scores.")
    copy_rate: PositiveFloat = Field(description="Bytes that a rank reads and writes per second.")
    loss: PositiveFloat = Field(description="Bytes of logits per second in the forward of cross entropy.")
    launch: NonNegative = Field(description="Seconds that the host takes to launch a kernel, autograd included.")
    sync: NonNegative = Field(description="Seconds from the begin of a host sync until the device has work again.")
    cores: PositiveInt | None = Field(default=None, description="Cores that the ranks of a node share; null for GPUs.")
    ranks_per_node: PositiveInt = Field(description="Ranks of a node.")
    inside: tuple[LinkSection, ...] = Field(description="Exchanges inside a node, by rising number of ranks.")
    between: LinkSection | None = Field(default=None, description="Exchanges between nodes; null if not known.")
    scale: ScaleSection = Field(default_factory=ScaleSection, description="Fitted factors.")

    def violations(self) -> Iterator[Violation]:
        ranks = [link.ranks for link in self.inside]
        if not ranks or ranks != sorted(set(ranks)):
            problem = f"inside: ranks={ranks} must rise and have an entry; measure again with moe-dist calibrate"
            yield Violation(("inside",), problem)

    def link(self, ranks: int) -> LinkSection:
        """Returns the entry for exchanges of `ranks` ranks in a node: the smallest with enough ranks, else the last."""
        return next((link for link in self.inside if link.ranks >= ranks), self.inside[-1])


def read_rates(path: Path) -> Rates:
    """Reads a rates file that `moe-dist calibrate` wrote. If it cannot be read or has faults, raises a ConfigError that
    lists all of them."""
    try:
        values, problems = read_mapping(path, "keys (machine, gemm, inside, ...)")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--rates {path}: cannot be read ({error}); measure rates with moe-dist calibrate") from error
    if values is None or problems:
        raise ConfigError([f"--rates {path}: {problem}" for problem in problems], see=GUIDE)
    return draft(Rates, values).checked(
        Rates.violations, lambda found: ConfigError([f"--rates {path}: {problem}" for problem in found], see=GUIDE)
    )


def rates_text(rates: Rates) -> str:
    """Returns the text of a rates file."""
    return dump_yaml(rates.model_dump(mode="json"))


# From NVIDIA's data sheets: bytes/s of memory, bytes/s to other GPUs of a node in one direction, and bytes of memory.
PUBLISHED: dict[str, tuple[float, float, float]] = {
    "GB200": (8.0e12, 900e9, 186e9),
    "B200": (8.0e12, 900e9, 180e9),
    "GH200": (4.0e12, 450e9, 96e9),
    "H200": (4.8e12, 450e9, 141e9),
    "H100": (3.35e12, 450e9, 80e9),
    "H800": (3.35e12, 200e9, 80e9),
    "A100": (2.04e12, 300e9, 80e9),
    "A800": (2.04e12, 200e9, 80e9),
}


def published_rates(card: str, peak: float | None, *, ranks_per_node: int, between: float | None) -> Rates:
    """Returns rates from data sheets. The fractions of a GPU's peak rates that programs reach are assumptions, not
    measured: 0.71 of the FLOP/s for large products, 0.56 for experts' products, 0.4 for attention, 0.8 of the memory's
    rate, and 0.73 of the links' rate.

    Args:
        peak: FLOP/s of dense products in bf16; None if it is not known.
        between: Number of bytes/s that a GPU sends to other nodes; None if it is not known.
    """
    if card.upper() not in PUBLISHED or peak is None:
        raise ConfigError(
            f"gpus.type={card}: no published rates of this card; take one of {', '.join(PUBLISHED)}, or measure the rates "
            "with moe-dist calibrate and give --rates",
            see=GUIDE,
        )
    memory_rate, link, memory = PUBLISHED[card.upper()]
    copy, sizes, shares = 0.8 * memory_rate, (1.0, 64.0, 256.0, 1024.0, 4096.0), (1.0, 1.0, 0.7, 0.9, 1.0)

    def curve(share: float) -> CurveSection:  # for few rows, reading the weights limits the rate
        rates = (min(size * copy, part * share * peak) for size, part in zip(sizes, shares, strict=True))
        return CurveSection(sizes=sizes, rates=tuple(rates))

    far = None if between is None else LinkSection(ranks=ranks_per_node, latency=3e-5, bytes_per_second=between)
    return Rates(
        machine="data sheet",
        card=card,
        source="extrapolated",
        memory=memory,
        gemm=curve(0.71),
        grouped=curve(0.56),
        attention=0.4 * peak,
        copy_rate=copy,
        loss=copy / 4,  # reads and writes logits and their logarithms
        launch=7e-6,
        sync=2.5e-4,
        ranks_per_node=ranks_per_node,
        inside=(LinkSection(ranks=ranks_per_node, latency=2e-5, bytes_per_second=0.73 * link),),
        between=far,
    )
