"""The schema of an experiment's measurements."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from tools.experiments.values import ArmName, Part

LEFT = 500  # training questions of each task that no base is trained on; routers are tuned on them


class CurveSection(Part):
    """Held-out loss during a run, at each checkpoint, on the mean of the weights of the checkpoints in the last `average`
    of the steps taken so far."""

    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    sequences: PositiveInt = 64
    of: ArmName | None = None  # eta is measured against this arm


class WireSection(Part):
    """The layout for which rows on the wire are counted."""

    ep: PositiveInt = 4
    placement: Literal["interleaved"] = "interleaved"


class QuestionsSection(Part):
    """Multiple choice by log-likelihood a token: on the test side, in a pilot on the validation side."""

    tasks: tuple[str, ...] = Field(min_length=1)
    limit: PositiveInt | None = None  # for each task
    wordnet: str = ".cache/package/dict"
    embedder: str | None = None  # by default that of `make embedder`
    least: Annotated[int, Field(ge=0)] = 0  # required total of test questions
    left: Annotated[int, Field(ge=1, le=LEFT)] = LEFT  # training questions of each task in `samples`
    listed: bool = False  # questions list their choices, and a success must be right under each rotation
    oracle_questions: PositiveInt = 100  # first questions of each task
    oracle_layers: PositiveInt = 5  # number of last layers


class MeasureSection(Part):
    """What is measured of a finished run."""

    sequences: PositiveInt = 256
    curve: CurveSection | None = None
    wire: WireSection = Field(default_factory=WireSection)
    threshold_loads: tuple[PositiveFloat, ...] = ()
    flips: tuple[PositiveFloat, ...] = ()
    questions: QuestionsSection | None = None
