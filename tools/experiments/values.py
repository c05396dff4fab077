"""The values that an experiment's rules compare: numbers from the records of its arms."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_dist.config.section import NAME_PATTERN

ArmName = Annotated[str, Field(pattern=NAME_PATTERN)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ArmValue(Part):
    """A number of an arm's record, by its dotted path: `loss.image`, `load.all`."""

    arm: ArmName
    metric: str


class InterpolatedValue(Part):
    """`y` at the load of another arm, by straight lines through the arms `through`, sorted by their `x`.

    The last line is extended by `reach` beyond the outermost arms; farther off there is no value.
    """

    through: tuple[ArmName, ...] = Field(min_length=2)
    x: str
    y: str
    at: ArmName
    reach: Annotated[float, Field(ge=0.0)] = 0.1


class EtaValue(Part):
    """ln eta: how much less an arm spends than `of` to reach the held-out loss with which `of` ends."""

    eta: ArmName
    of: ArmName
    part: str
    cost: Literal["flops", "seconds"] = "flops"


class ConstantValue(Part):
    constant: float


class Term(Part):
    """A number of an arm's record, and its factor."""

    arm: ArmName
    metric: str
    times: float = 1.0


class SumValue(Part):
    """A weighted sum of numbers of records."""

    sum: tuple[Term, ...] = Field(min_length=1)


class RatioValue(Part):
    """The rise of a probe's loss over the plain evaluation's: probe(arm) at `at`."""

    arm: ArmName
    probe: str
    at: float
    factor: float = 1.0
    part: str = "all"


Value = ArmValue | InterpolatedValue | EtaValue | ConstantValue | SumValue | RatioValue


class ValueRule(Part):
    """`lower` is below `higher` + margin.

    By `bound`: the upper one-sided 95 % t-bound of the mean paired difference lower - higher is below the margin. By
    `mean`: the mean difference itself is at most the margin.
    """

    claim: str
    lower: Value
    higher: Value
    margin: float = 0.0
    by: Literal["bound", "mean"] = "bound"


def arms_of(value: Value) -> tuple[str, ...]:
    """The arms whose records a value needs."""
    match value:
        case InterpolatedValue():
            return (*value.through, value.at)
        case EtaValue():
            return (value.eta, value.of)
        case ArmValue() | RatioValue():
            return (value.arm,)
        case SumValue():
            return tuple(term.arm for term in value.sum)
        case ConstantValue():
            return ()
