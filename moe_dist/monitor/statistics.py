"""The input of monitoring after each step: global sums, as plain numbers and numpy arrays.

All scalars and pictures are computed from it by pure functions (`metrics.py`); sinks do not access the model. Shape
letters: L MoE layers, G groups, C choice columns (all true experts by logical id, then the groups' null experts, identity
experts and constant experts), R ranks of an EP group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moe_dist.placement.counts import StepCounts


@dataclass(frozen=True)
class DepthStatistics:
    """Mixture-of-depths layers: sums over all ranks and micro-batches of a step, or over a held-out evaluation. L counts
    these layers here.

    Attributes:
        layers: Index in the model of each.
        capacity: Share of the tokens that each should compute.
        groups: Names of the columns G.
        tokens_LG, taken_LG: int64, tokens of each group, and those that the layer computed.
        agreed_L: int64, tokens for which the causal decision equals the selection of training; None in evaluation, which
            uses only the causal decision.
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
    """One optimizer step, summed over all ranks and micro-batches, as plain numbers. Shape letters: M modalities of the
    data, in the manifest's order; W ranks of the world.

    Attributes:
        nll_M, labels_M: Token losses (nats) and scored labels by the label's modality.
        balance, z: Both terms as added to the loss, coefficients included.
        auxiliary: The term of auxiliary routers, or of router tuning, as added to the loss; 0 without either.
        grad_norm: Global norm before clipping, not finite if the step was skipped.
        skipped: No rank took the step, because the loss or a gradient was not finite.
        tokens: Input tokens without padding.
        counts: Routing counts.
        ledger: Sums of the dispatch ledger, by `moe_dist.moe.dispatch.ledger.LEDGER_KEYS`. Bytes and rows.
        comm_seconds: Mean over ranks of the time inside dispatch and combine collectives.
        busy_seconds_W: Seconds in which each rank computed and read data in the step before, without waiting for peers;
            empty in the first step.
        stop_requested: At least one rank was asked to stop.
        mixture_of_depths: Sums of the mixture-of-depths layers; None without any.
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
    """The result of a step, with values that only the training loop knows.

    Attributes:
        result: Result of the step.
        step: Steps taken, this one included (1 is the first).
        balance_coefficient: Coefficient of the balance loss in this step.
        lr: Learning rate of this step.
        skipped_steps: Skipped steps so far.
        tokens: Tokens seen so far (padding excluded).
        step_seconds: Wall time of the step.
        epochs: Epochs seen of each modality.
        flops_per_token: Forward and backward FLOPs per token at the measured number of experts; None if unknown.
        active_target: Target of a load controller, in true experts per token, by group.
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
        step: Step after which they were measured.
        loss: Nats per token by modality; 'image_no_filler' if the data marks filler cells.
        tokens: Number of labels of each loss.
        ablated_loss: The same with the experts' output set to zero; empty if not measured.
        balance_efficiency: Throughput with real over evenly spread routing; None if the timing would mean nothing.
        balance_efficiency_by_count: Mean over max of the ranks' weighted rows: the efficiency that the counts allow.
        balance_note: Why the timing is None, or how it was measured.
        choice_loss: With expert choice: `loss` under the selection of training, which sees later tokens; empty if not
            measured.
        experts_per_token, choice_experts_per_token: True experts per token by group: as evaluated, and under the selection
            of training.
        mixture_of_depths: Sums of the mixture-of-depths layers, by their causal decision; None without any.
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
