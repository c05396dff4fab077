"""The schema of router tuning (RoMA): layers, neighbours, strength. `schema` has the whole."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from moe_dist.config.section import Count, NonNegative, PathText, Section, Violation


class NearestSection(Section):
    """The k nearest samples."""

    kind: Literal["nearest"] = "nearest"
    k: PositiveInt = Field(default=3, description="Neighbours of a sample, itself left out; RoMA's best is 3.")


class RadiusSection(Section):
    """All samples that are similar enough."""

    kind: Literal["radius"] = "radius"
    similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Least similarity exp(-d^2 / (2 bandwidth^2)) of a neighbour; RoMA takes 0.5. A sample may have none."""


NeighboursSection = Annotated[NearestSection | RadiusSection, Field(discriminator="kind")]


class RouterTuningSection(Section):
    """Router tuning (RoMA): cross entropy of right answers, and routing pulled towards that of successful neighbours."""

    data: PathText = Field(description="Folder that `moe-dist prepare-router-tuning` made from the run to be tuned.")
    last_layers: PositiveInt = Field(default=5, description="Routers of how many MoE layers move, counted from the last.")
    layers: tuple[Count, ...] = ()
    """Indices of the layers whose routers move, instead of the last ones."""
    regulariser: Literal["manifold", "l2"] = "manifold"
    """What a sample's routing is pulled towards: that of its neighbours (RoMA), or its own before the first step (l2)."""
    weight: NonNegative = 1.0
    """Coefficient of the regulariser (lambda, which RoMA's paper does not give); 0 is cross entropy alone."""
    neighbours: NeighboursSection = Field(default_factory=NearestSection)
    """Which samples are neighbours, in the space of the questions' embeddings."""
    bandwidth: PositiveFloat = 1.0
    """Of the Gaussian that weighs neighbours (RoMA's sigma, not given either), in units of the embeddings; those of length
    1 are 0 to 2 apart."""
    filter_by_success: bool = True
    """Only samples that the run has right are neighbours; false takes all (an ablation)."""
    random_neighbours: bool = False
    """k neighbours at random instead of the nearest (an ablation)."""
    refresh_every: PositiveInt | None = None
    """Steps after which neighbours' routing is computed anew with the routers of now; null keeps what the run had."""
    embedder: str | None = None
    """First digits of the SHA-256 of the embedder that the data must have been made with; null takes any."""

    @field_validator("neighbours", mode="before")
    @classmethod
    def _nearest_unless_said(cls, value: Any) -> Any:
        """`neighbours: {k: 5}` means the default kind, which has that key."""
        return {"kind": "nearest", **value} if isinstance(value, dict) and "kind" not in value else value

    def violations(self) -> Iterator[Violation]:
        if self.random_neighbours and self.neighbours.kind == "radius":
            problem = (
                "random_neighbours=true: draws neighbours.k of them, and kind=radius has no k; take neighbours.kind=nearest"
            )
            yield Violation(("random_neighbours", "neighbours"), problem)
        if self.refresh_every is not None and (self.regulariser == "l2" or self.weight == 0.0):
            why = "regulariser=l2 pulls towards the routing before the first step" if self.weight else "weight=0 uses none"
            problem = f"refresh_every={self.refresh_every}: {why}, so that there is nothing to compute anew; set it to null"
            yield Violation(("refresh_every", "regulariser", "weight"), problem)
