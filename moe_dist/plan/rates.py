"""The rates of a machine that the step model needs: products, copies, launches and exchanges. Imports no torch.

`moe-dist calibrate` measures them into a file. `docs/planning.md` has the fields, and where published rates come from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.partial import draft
from moe_dist.config.section import NonNegative, Section, Violation
from moe_dist.config.yaml_text import dump_yaml, read_mapping
from moe_dist.errors import ConfigError

GUIDE = "docs/planning.md"
Mark = Literal["measured", "fitted", "extrapolated"]
MARKS: tuple[Mark, ...] = ("measured", "fitted", "extrapolated")  # from the surest to the least sure


def weakest(*marks: Mark) -> Mark:
    """Returns the least sure of the marks: that of a number which is computed from all of them."""
    return max(marks, key=MARKS.index)


class CurveSection(Section):
    """A rate by size, between the sizes by logarithms; beyond them the rate of the nearest size."""

    sizes: tuple[PositiveFloat, ...] = Field(description="Rows of a product, rising.")
    rates: tuple[PositiveFloat, ...] = Field(description="FLOP/s at each size.")

    def violations(self) -> Iterator[Violation]:
        if len(self.sizes) != len(self.rates) or not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            problem = f"sizes={list(self.sizes)}, rates={list(self.rates)}: need one rate for each size, and rising sizes"
            yield Violation(("sizes", "rates"), f"{problem}; measure again with moe-dist calibrate")

    def at(self, size: np.ndarray | float) -> np.ndarray:
        """Returns the rate at sizes of any shape; a size below 1 counts as 1."""
        logs = np.interp(np.log(np.maximum(size, 1.0)), np.log(self.sizes), np.log(self.rates))
        return np.exp(logs)


class LinkSection(Section):
    """An exchange of `ranks` ranks takes latency + bytes of the busiest rank / bytes_per_second (alpha-beta model)."""

    ranks: PositiveInt = Field(description="Number of ranks that exchange at the same time.")
    latency: NonNegative = Field(description="Seconds of an exchange without rows.")
    bytes_per_second: PositiveFloat = Field(description="Bytes that a rank sends per second while it receives as many.")


class ScaleSection(Section):
    """Factors that are fitted to measured steps; 1 and 0 without a fit."""

    dense: PositiveFloat = Field(default=1.0, description="Seconds of everything but experts, over those by the rates.")
    experts: PositiveFloat = Field(default=1.0, description="Seconds of experts, over those by the rates.")
    exchange: PositiveFloat = Field(default=1.0, description="Seconds of exchanges, over those by the rates.")
    step: NonNegative = Field(default=0.0, description="Seconds of a step beside its micro-batches.")


class Rates(Section):
    """The rates of one machine."""

    machine: str = Field(description="Name of the machine on which the rates hold.")
    card: str = Field(description="Name of the GPU or CPU.")
    source: Mark = Field(description="Whether rates are measured, fitted to measured steps, or from data sheets.")
    memory: PositiveFloat = Field(description="Bytes of memory of a rank.")
    gemm: CurveSection = Field(description="Products with one weight.")
    grouped: CurveSection = Field(description="Products of several experts, by rows of an expert.")
    attention: PositiveFloat = Field(description="FLOP/s of the products over positions.")
    copy_rate: PositiveFloat = Field(description="Bytes that a rank reads and writes per second.")
    launch: NonNegative = Field(description="Seconds in which the host starts a kernel.")
    sync: NonNegative = Field(description="Seconds of a host sync, until the device has work again.")
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
        """Returns the link inside a node for this many ranks: the entry of the next larger number, or of the largest."""
        return next((link for link in self.inside if link.ranks >= ranks), self.inside[-1])


def read_rates(path: Path) -> Rates:
    """Reads a file of `moe-dist calibrate`.

    Raises:
        ConfigError: the file cannot be read, or has faults; lists all of them.
    """
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
