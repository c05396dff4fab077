"""Defines the rules of an experiment, and the values that rules compare. A value is computed from the records of arms."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat

from moe_dist.config.base.section import NAME_PATTERN

CONFIDENCE = 0.95

ArmName = Annotated[str, Field(pattern=NAME_PATTERN)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ArmValue(Part):
    """A number in an arm's record, at a dotted path such as `loss.image` or `load.all`."""

    arm: ArmName
    metric: str


class InterpolatedValue(Part):
    """Interpolates linearly between the points (`x`, `y`) of the arms `through`, at the `x` of the arm `at`. `x` and `y`
    are dotted paths of numbers in a record.

    The first and the last line extend by `reach` beyond the outermost arms. Farther outside there is no value.
    """

    through: tuple[ArmName, ...] = Field(min_length=2)
    x: str
    y: str
    at: ArmName
    reach: NonNegativeFloat = 0.1


class EtaValue(Part):
    """ln eta, where eta = (training cost of the arm `of`) / (cost at which the arm `eta` reaches the last loss of `of`).

    The loss is the held-out loss or the training loss. In training, experts that choose tokens see later tokens.
    """

    eta: ArmName
    of: ArmName
    part: str
    cost: Literal["flops", "seconds", "bytes"] = "flops"
    loss: Literal["heldout", "training"] = "heldout"


class ConstantValue(Part):
    constant: float


class Term(ArmValue):
    """A number in an arm's record, multiplied by a factor."""

    times: float = 1.0


class SumValue(Part):
    """A weighted sum of numbers in records."""

    sum: tuple[Term, ...] = Field(min_length=1)


class RatioValue(Part):
    """`factor` times the rise of the loss that a probe with the setting `at` causes. The rise is the loss with the probe
    minus the loss without the probe."""

    arm: ArmName
    probe: str
    at: float
    factor: float = 1.0
    part: str = "all"


Value = ArmValue | InterpolatedValue | EtaValue | ConstantValue | SumValue | RatioValue


class ValueRule(Part):
    """A rule. It holds if the value `lower` is below `higher` + `margin`, in the sense of `by`.

    With by=bound, the upper one-sided t-bound of the mean paired difference (lower - higher) must be below the margin.
    `Study.confidence` is the confidence of the bound. With by=mean, the mean paired difference itself must be at most the
    margin.
    """

    claim: str
    lower: Value
    higher: Value
    margin: float = 0.0
    by: Literal["bound", "mean"] = "bound"

    @property
    def arms(self) -> list[str]:
        """Returns the arms whose records the rule needs."""
        found: list[str] = []
        for value in (self.lower, self.higher):
            match value:
                case InterpolatedValue():
                    found += [*value.through, value.at]
                case EtaValue():
                    found += [value.eta, value.of]
                case ArmValue() | RatioValue():
                    found.append(value.arm)
                case SumValue():
                    found += [term.arm for term in value.sum]
        return found
