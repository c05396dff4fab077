"""What the training loop hands to monitoring once a step: global sums, as plain numbers and numpy arrays.

Everything shown is computed from this record by pure functions (`metrics.py`), so that no sink reaches into the model.
Shape letters: L MoE layers, G groups, C choice columns (all true experts by logical id, then the groups' null experts,
their identity and their constant ones), R ranks of an EP group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_dist.placement.counts import StepCounts


@dataclass(frozen=True)
class DepthStatistics:
    """Layers that compute a share of the tokens alone (mixture of depths): sums over all ranks and micro-batches of a step,
    or over a held-out evaluation. L counts these layers here.

    Attributes:
        layers: Index in the model of each.
        capacity: Share of the tokens that each is meant to compute.
        groups: Names of the columns G.
        tokens_LG, taken_LG: int64, tokens of each group, and those of them that the layer computed.
        agreed_L: int64, tokens on which the causal decision of evaluation is the choice of training; None in evaluation,
            where that decision is all there is.
        weight_L: float64, sum of the weights of the computed tokens; None in evaluation.
    """

    layers: tuple[int, ...]
    capacity: float
    groups: tuple[str, ...]
    tokens_LG: np.ndarray
    taken_LG: np.ndarray
    agreed_L: np.ndarray | None = None
    weight_L: np.ndarray | None = None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, summed over all ranks and micro-batches: plain numbers. Shape letters: M modalities of the data, in
    the manifest's order; W ranks of the world.

    Attributes:
        nll_M, labels_M: Token losses (nats) and scored labels by the label's modality.
        balance, z: The balance terms as they entered the loss, coefficients included.
        auxiliary: The term of auxiliary routers, or of router tuning, as it entered the loss; 0 without either.
        grad_norm: Global norm before clipping, not finite where the step was skipped.
        skipped: No rank took the step, since the loss or a gradient was not finite.
        tokens: Input tokens without padding.
        counts: Routing counts.
        ledger: Sums of the dispatch ledger, by `moe_dist.moe.dispatch.ledger.LEDGER_KEYS`. Bytes and rows.
        comm_seconds: Mean over ranks of the time inside dispatch and combine collectives.
        busy_seconds_W: For each rank, how long it computed and read data in the step before, waiting for peers left out;
            empty in the first step.
        stop_requested: At least one rank was asked to stop.
        mixture_of_depths: Of the layers that compute a share of the tokens alone; None without any.
    """

    nll_M: np.ndarray
    labels_M: np.ndarray
    balance: float
    z: float
    auxiliary: float
    grad_norm: float
    skipped: bool
    tokens: int
    counts: StepCounts[np.ndarray]
    ledger: Mapping[str, int]
    comm_seconds: float
    busy_seconds_W: np.ndarray
    stop_requested: bool = False
    mixture_of_depths: DepthStatistics | None = None


@dataclass(frozen=True)
class StepStatistics:
    """A step's result, and what the loop knows of it.

    Attributes:
        result: Of the step.
        step: Steps taken, this one included (1 is the first).
        balance_coefficient: Coefficient of the balance loss in this step.
        lr: Learning rate of this step.
        skipped_steps: Skipped steps so far.
        tokens: Tokens seen so far (padding excluded).
        step_seconds: Wall time of the step.
        epochs: Epochs seen of each modality.
        flops_per_token: Forward and backward FLOPs a token at the measured number of experts; None if unknown.
        active_target: True experts a token that a controller holds a group at, by group.
    """

    result: StepResult
    step: int
    balance_coefficient: float
    lr: float
    skipped_steps: int
    tokens: int
    step_seconds: float
    epochs: Mapping[str, float] = field(default_factory=dict)
    flops_per_token: float | None = None
    active_target: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationResult:
    """Held-out losses at one step.

    Attributes:
        step: Step after which it was taken.
        loss: Nats a token by modality; 'image_no_filler' where the data marks filler cells.
        tokens: Labels behind each loss.
        ablated_loss: The same with the experts' output zeroed; empty where not measured.
        balance_efficiency: Throughput with real over evenly spread routing; None where the timing means nothing.
        balance_efficiency_by_count: Mean over max of the ranks' weighted rows: what the counts alone allow.
        balance_note: Why the timing is None, or how it was taken.
        choice_loss: `loss` where experts choose as in training, looking at later tokens; empty where not measured.
        experts_per_token, choice_experts_per_token: True experts a token takes, by group: as evaluated, and with the choice
            of training.
        mixture_of_depths: Of the layers that compute a share of the tokens alone, by their causal decision; None without any.
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
