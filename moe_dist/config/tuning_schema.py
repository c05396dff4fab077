"""Defines the section for router tuning (RoMA), and its rules that do not depend on the data."""

import importlib.util
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveFloat, Tag

from moe_dist.config.base.kinds import kind_or
from moe_dist.config.base.section import Count, NonNegative, PathText, PositiveInt, Section, Violation, WholeConfig, unmet

KEY = "router_tuning"


NEEDS = (
    ("run.init_rules", ((),), f"{KEY}.data was made from the unchanged model of run.init_from"),
    ("run.keep_position", (False,), "it reads other data than that checkpoint did"),
    ("loss.z", (0.0,), "a z-loss would change the routing"),
    ("model.moe.router.softmax_top_k", (True,), "it compares softmax probabilities of a top-k choice"),
    ("model.mixture_of_depths", (None,), "a token that skips a layer has no routing there to compare"),
    ("model.moe.balance", ((),), "controllers would change the selection biases, which stay those of the checkpoint"),
)


class NearestSection(Section):
    """Neighbours of a sample are the k samples with the nearest embeddings."""

    kind: Literal["nearest"] = "nearest"
    k: PositiveInt = Field(default=3, description="Neighbours of a sample, not counting the sample. RoMA is best with 3.")


class RadiusSection(Section):
    """Neighbours of a sample are all samples whose similarity to it reaches a limit."""

    kind: Literal["radius"] = "radius"
    similarity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Smallest similarity exp(-d^2 / (2 bandwidth^2)) of a neighbour at distance d. RoMA uses 0.5. Some samples have
    none."""


NeighboursSection = Annotated[
    Annotated[NearestSection, Tag("nearest")] | Annotated[RadiusSection, Tag("radius")], Discriminator(kind_or("nearest"))
]


class RouterTuningSection(Section):
    """Router tuning (RoMA): train routers by cross entropy on right answers, with a regulariser that pulls a sample's
    routing towards the routing of its successful neighbours."""

    data: PathText = Field(description="Folder that `moe-dist prepare-router-tuning` made from the run to be tuned.")
    last_layers: PositiveInt = Field(
        default=5, description="Number of MoE layers, from the last, whose routers are trained."
    )
    layers: tuple[Count, ...] = ()
    """Indices of the layers whose routers are trained. Overrides last_layers."""
    objective: Literal["tokens", "choices"] = "tokens"
    """Cross entropy that trains routers. tokens: cross entropy of all tokens of the right answer, over the whole
    vocabulary. choices: cross entropy of only its first token, over the first tokens of the question's choices, as in
    RoMA's code."""
    regulariser: Literal["manifold", "l2"] = "manifold"
    """Target of a sample's routing. manifold: the routing of the sample's neighbours (RoMA). l2: the sample's own routing
    before the first step."""
    weight: NonNegative = 1.0
    """Coefficient of the regulariser (lambda). RoMA's paper gives no value; its code uses 0.8. 0: no regulariser."""
    neighbours: NeighboursSection = Field(default_factory=NearestSection)
    """Rule that selects a sample's neighbours by the distance between the embeddings of the questions."""
    bandwidth: PositiveFloat = 1.0
    """Standard deviation of the Gaussian that weights neighbours by distance (sigma). RoMA's paper gives no value; its code
    uses 0.4. Embeddings have length 1, so distances are between 0 and 2."""
    filter_by_success: bool = True
    """true: only samples that the run answers correctly may be neighbours. false: all samples may be (an ablation)."""
    random_neighbours: bool = False
    """Use k random samples as neighbours instead of the k nearest samples (an ablation)."""
    refresh_every: PositiveInt | None = None
    """Number of steps after which the neighbours' routing is recomputed with the current routers. null: never."""
    embedder: str | None = None
    """First digits of the SHA-256 of the embedder with which the data must have been made. null: any embedder."""

    @property
    def over_vocabulary(self) -> bool:
        """True if the loss needs the logits of the whole vocabulary."""
        return self.objective == "tokens"

    def chosen_layers(self, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the indices of the transformer layers whose routers are trained, in order."""
        return tuple(sorted(self.layers)) or moe_layers[-self.last_layers :]

    def violations(self) -> Iterator[Violation]:
        if self.random_neighbours and self.neighbours.kind == "radius":
            problem = "random_neighbours=true: needs neighbours.k, and kind=radius has no k; set neighbours.kind=nearest"
            yield Violation(("random_neighbours", "neighbours"), problem)
        if self.refresh_every is not None and (self.regulariser == "l2" or self.weight == 0.0):
            why = "regulariser=l2" if self.weight else "weight=0"
            problem = f"refresh_every={self.refresh_every}: {why} does not use the neighbours' routing; set it to null"
            yield Violation(("refresh_every", "regulariser", "weight"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        only = config.train.only
        if only != "routers":
            problem = f"train.only={only or 'null'}: {KEY} trains routers alone; set train.only=routers, or remove {KEY}"
            yield Violation(("train.only", KEY), problem)
        if config.run.init_from is None and config.model.folder is None:
            problem = (
                f"run.init_from=null: {KEY} tunes a trained model; set it to the run that {KEY}.data is made from, or with "
                "engine.kind=transformers set model.folder"
            )
            yield Violation(("run.init_from", KEY), problem)
        yield from unmet(config, KEY, KEY, NEEDS, instead=f"remove {KEY}")
        yield from _layer_violations(self, config)


def _layer_violations(section: RouterTuningSection, config: WholeConfig) -> Iterator[Violation]:
    there, moe = config.model.moe_layers, config.model.moe
    if section.weight and section.regulariser == "manifold" and importlib.util.find_spec("sklearn") is None:
        problem = f"{KEY}.neighbours: needs the package scikit-learn; install moe_dist[router-tuning], or {KEY}.weight=0"
        yield Violation((f"{KEY}.neighbours",), problem)
    if not section.layers and section.last_layers > len(there):
        problem = (
            f"{KEY}.last_layers={section.last_layers}: the model has {len(there)} MoE layers; take at most all of them"
        )
        yield Violation((f"{KEY}.last_layers", "model.num_layers"), problem)
    wrong = sorted(set(section.layers) - set(there))
    if wrong or len(set(section.layers)) < len(section.layers):
        what = f"layers {wrong} hold no experts" if wrong else "a layer is listed twice"
        problem = f"{KEY}.layers={list(section.layers)}: {what}; take some of {list(there)}, each once"
        yield Violation((f"{KEY}.layers", "model.num_layers", "model.moe"), problem)
    if section.weight == 0.0 and config.model.no_task_gradient:
        problem = (
            f"{KEY}.weight=0: with top_k=1 and normalised weights ({moe.router.said}) each weight is always 1, so that "
            f"cross entropy gives no router a gradient; set {KEY}.weight above 0, or tune a run with top_k of 2 or more"
        )
        yield Violation((f"{KEY}.weight", "model.moe.router", "model.moe.groups"), problem)
