"""Defines the input of monitoring: sums over all ranks for a step or an evaluation, as plain numbers and numpy arrays.

Pure functions (`metrics.py`) compute all scalars and pictures from these sums. Sinks therefore never touch the model. Shape
letters: L MoE layers, G expert groups, M modalities in the order of the data set's manifest, W ranks of the world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class DepthStatistics:
    """Sums over a step or a held-out evaluation for each mixture-of-depths layer. Here L counts only these layers.

    Attributes:
        layers: Index in the model of each mixture-of-depths layer.
        token_share: Fraction of the tokens that each layer should compute.
        tokens_LG, taken_LG: int64, number of all tokens, and number of computed tokens, of each group.
        agreed_L: int64, number of tokens for which the causal decision equals training's top-k selection; None in an
            evaluation, which makes only causal decisions.
        weight_L: float64, sum of the gate weights of the computed tokens; None in an evaluation.
    """

    layers: tuple[int, ...]
    token_share: float
    groups: tuple[str, ...]
    tokens_LG: np.ndarray
    taken_LG: np.ndarray
    agreed_L: np.ndarray | None = None
    weight_L: np.ndarray | None = None


class LeverDecision(NamedTuple):
    """A decision of one lever (load-balancing method) of `rank_balance`: a change that the lever made or refused.

    Attributes:
        taken: False if the change was refused.
        before, after: Busiest rank's load / mean load of a rank, without and with the change; 1 if all loads are equal.
        cost_steps: Time that the change costs, in units of steps. For a move this is the cost of the move; for replicas,
            the total cost until the next decision.
        placement: Placement after this step if the lever moved experts or changed replicas, otherwise None.
    """

    lever: str
    taken: bool
    before: float
    after: float
    cost_steps: float
    why: str
    placement: ExpertPlacement | None = None

    @property
    def gain(self) -> float:
        """Returns the fraction of the busiest rank's load that the change saves in each step."""
        return 1.0 - self.after / self.before if self.before else 0.0

    @property
    def line(self) -> dict[str, Any]:
        """Returns the decision for metrics.jsonl."""
        where = {} if self.placement is None else self.placement.line
        return {name: value for name, value in self._asdict().items() if name != "placement"} | {"gain": self.gain} | where

    @property
    def text(self) -> str:
        """Returns a line that says whether the lever acted, and how the load of the busiest rank changes."""
        verdict = "done" if self.taken else "refused"
        return (
            f"{self.lever} {verdict}: busiest rank over mean {self.before:.3f} -> {self.after:.3f}, a gain of "
            f"{self.gain:.1%} of its load in each step, for {self.cost_steps:.2g} steps; {self.why}"
        )


class MappedPicture(NamedTuple):
    """One picture of a `ComputeMap`.

    Attributes:
        experts: float64 [rows, columns], number of true experts of each cell.
        empty: bool [rows, columns], True if the data mark a cell as background.
        pixels: RGB values, uint8 [height, width, 3]; None if the data have no codebook.
    """

    experts: np.ndarray
    empty: np.ndarray
    pixels: np.ndarray | None


@dataclass(frozen=True)
class ComputeMap:
    """The numbers of true experts of some held-out tokens, as means over MoE layers.

    Attributes:
        mean: Mean over all mapped tokens of one kind, by kind of token, such as 'text' or 'background'.
        most: Largest possible number of true experts per token.
        lines: For each mapped line of text, one entry per token: the token's text and its number of true experts.
    """

    mean: Mapping[str, float]
    most: int
    pictures: Sequence[MappedPicture] = ()
    lines: Sequence[Sequence[tuple[str, float]]] = ()


@dataclass(frozen=True)
class EvaluationResult:
    """The results of a held-out evaluation. An optional mapping is empty if its values were not measured.

    Attributes:
        step: Number of steps that were taken before the evaluation.
        loss: Loss in nats per token by modality; also for 'image_no_filler' if the data mark filler cells.
        tokens: Number of labels over which each loss is a mean.
        ablated_loss: The held-out losses with the experts' output set to zero.
        balance_efficiency: Throughput with the real routing / throughput with evenly spread routing. None if not measured.
        balance_efficiency_by_count: Mean work of a rank / largest work of a rank (work = pairs x FFN width). It would equal
            balance_efficiency if time were proportional to work.
        balance_note: How balance_efficiency was measured, or why it was not measured.
        choice_loss: For expert choice, the losses with the selection of training, which depends on later tokens.
        experts_per_token: Number of true experts per token in this evaluation, by group.
        choice_experts_per_token: For expert choice, the same number with the selection of training.
        mixture_of_depths: Sums over the mixture-of-depths layers with causal decisions; None without such layers.
        compute_map: The map of experts per token. None without `monitor.compute_map`, and on ranks other than 0.
    """

    step: int
    loss: Mapping[str, float]
    tokens: Mapping[str, int]
    ablated_loss: Mapping[str, float] = field(default_factory=dict)
    balance_efficiency: float | None = None
    balance_efficiency_by_count: float | None = None
    balance_note: str = ""
    choice_loss: Mapping[str, float] = field(default_factory=dict)
    experts_per_token: Mapping[str, float] = field(default_factory=dict)
    choice_experts_per_token: Mapping[str, float] = field(default_factory=dict)
    mixture_of_depths: DepthStatistics | None = None
    compute_map: ComputeMap | None = None


class WeightTable(NamedTuple):
    """Measures of the N trained tensors of a model around one update. An expert's tensors have their own rows.

    Attributes:
        names: Logical names.
        squares_N3: Squared norms of the weight, the update and the gradient, estimated from some elements; float64.
        sketch_NX: Some elements of each weight, float64. Equal weights have equal sketches.
        outputs_LE2: For each MoE layer and expert: sum of the squared sizes of the expert's outputs, along the gradient of
            the layer's output, and number of (token, expert) pairs.
    """

    names: Sequence[str]
    squares_N3: np.ndarray
    sketch_NX: np.ndarray
    outputs_LE2: np.ndarray = np.zeros((0, 0, 2))
