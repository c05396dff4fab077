"""Defines the input of a check (`CheckJob`), its readings with their limits (called bars), and its outcome."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

Verdict = Literal["pass", "fail", "not possible", "not run"]


class NotPossibleError(Exception):
    """The check needs something that this machine lacks. The message names what is missing."""


@dataclass(frozen=True)
class CheckJob:
    """Settings of a check; each check's process gets a copy of them.

    Attributes:
        gpus: Number of ranks, which on CUDA is also the number of GPUs.
        rehearse: True for a trial on the CPU with tiny shapes and Triton's interpreter. Times then have no bars (limits).
        rates: Rates per second that the check `ceilings` measured: `copy` (bytes read and written) and `gemm` (FLOPs).
    """

    gpus: int
    rehearse: bool
    folder: Path
    card: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    seconds: float = 600.0

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def rate(self, name: str) -> float:
        """Returns a rate of `rates`. Raises NotPossibleError if `name` is missing."""
        if name not in self.rates:
            raise NotPossibleError(
                f"no rate {name!r} to compare with: `ceilings` has not measured it; --fresh runs it again"
            )
        return self.rates[name]

    def timed(
        self, what: str, value: float, unit: str = "", *, least: float = -math.inf, most: float = math.inf
    ) -> "Reading":
        """Makes a reading that depends on times. Its limits `least` and `most` apply only on a GPU."""
        return Reading(what, value, unit) if self.rehearse else Reading(what, value, unit, least, most)


@dataclass(frozen=True)
class Reading:
    """A value, and the interval in which the value must be. NaN is in no interval."""

    what: str
    value: float
    unit: str = ""
    least: float = -math.inf
    most: float = math.inf

    @property
    def good(self) -> bool:
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        bars = [f"{sign} {bar:.4g}" for sign, bar in ((">=", self.least), ("<=", self.most)) if math.isfinite(bar)]
        return f"{self.what} {self.value:.4g}{f' {self.unit}' if self.unit else ''}" + (
            f" ({', '.join(bars)})" if bars else ""
        )


@dataclass(frozen=True)
class Outcome:
    """The result of one check.

    Attributes:
        verdict: "pass", "fail", "not possible" or "not run", see docs/gpu.md.
        reason: The readings outside their bars (limits), the error, or the missing part of the machine; empty after a pass.
    """

    verdict: Verdict
    reason: str = ""
    seconds: float = 0.0
    readings: tuple[Reading, ...] = ()

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> "Outcome":
        """Judges readings: the check passes if all readings are within their bars (limits)."""
        missed = [str(each) for each in readings if not each.good]
        return cls("fail" if missed else "pass", "; ".join(missed), readings=tuple(readings))

    def as_json(self) -> dict[str, Any]:
        """Returns values for JSON. NaN and infinite numbers become text, because JSON has no such numbers."""
        made = asdict(self)
        for reading in made["readings"]:
            reading |= {name: str(x) for name, x in reading.items() if isinstance(x, float) and not math.isfinite(x)}
        return made

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Outcome":
        """Makes an outcome from the result of `as_json`. Text such as "inf" becomes a number again."""
        return TypeAdapter(cls).validate_python(values)
