"""The records of a training step: the results of its forwards, the sums over all ranks, and the step's result.

Shape letters: I micro-batches of a rank, M modalities in the order of the data set's manifest, G expert groups, R readers
(ranks with different sequences), W ranks of the world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from moe_dist.moe.routing.counts import RoutingCounts, SentCounts
from moe_dist.moe.routing.types import GlobalBatchInfo
from moe_dist.monitor.statistics import DepthStatistics
from moe_dist.train.objective.loss import MicroLoss

Number = TypeVar("Number")


class Weights(NamedTuple):
    """Divisor and weights of the terms of a step's loss, from counts over all ranks."""

    labels_in_step: Tensor  # number of labels over all ranks, at least 1
    share_I: Tensor  # weight of each micro-batch's auxiliary terms
    share_IG: Tensor | None  # weights of auxiliary terms by micro-batch and group; None to use `share_I`
    batch_info: Sequence[GlobalBatchInfo | None]


class Forwarded(NamedTuple):
    """The sums over a step's micro-batches.

    Attributes:
        loss: This rank's share of the step's losses.
        counts: Routing counts over all ranks.
        own, sent: Routing counts of this rank, and its sent rows and pairs, of all layers.
        busiest_G: Largest load of an expert / even share of its group's choices, over all layers and micro-batches of this
            rank; 0 without tokens. A capacity factor of this size drops nothing. None if unknown.
    """

    loss: MicroLoss
    counts: RoutingCounts[Tensor]
    own: RoutingCounts[Tensor]
    sent: SentCounts | Tensor
    busiest_G: Tensor | None = None


class Readings(NamedTuple):
    """Readings of all ranks. Each rank fills its own row; the other rows are 0 until the ranks' readings are summed.

    Attributes:
        seconds_W: Seconds that a rank computed and read data, without waits for other ranks.
        memory_W3: `train.step.training_step.largest_memory`.
        busiest_WG: `Forwarded.busiest_G`; 0 if unknown.
    """

    seconds_W: Any
    memory_W3: Any
    busiest_WG: Any


class StepStart(NamedTuple, Generic[Number]):
    """Counts that one all-reduce sums before the first forward.

    Attributes:
        labels_I: Number of labels of each micro-batch.
        readings: The ranks' readings of the previous step; empty in the first step.
        members_RIG: Number of tokens of each reader, micro-batch and group; empty if no router needs them.
        tokens_IG: Number of tokens of each micro-batch and group; empty unless the balance loss uses loads of steps.
    """

    labels_I: Number
    readings: Readings
    members_RIG: Number
    tokens_IG: Number


class StepSums(NamedTuple, Generic[Number]):
    """A rank's share of the numbers that one all-reduce at the end of a step sums.

    Attributes:
        norm_squared: Squared norm of the gradient.
        balance, z, auxiliary, nll_M: See `MicroLoss`.
        labels_M: Number of labels of each modality.
        ledger: See `StepResult`.
        comm_seconds: Seconds inside dispatch and combine collectives.
        tokens: Input tokens without padding.
        stop_requested: 1 if the rank got a stop signal.
        overflow: Rows and pairs beyond the fixed sizes of exchanges.
    """

    norm_squared: Number
    balance: Number
    z: Number
    auxiliary: Number
    nll_M: Number
    labels_M: Number
    ledger: Mapping[str, float]
    comm_seconds: float
    tokens: float
    stop_requested: float
    overflow: float


@dataclass(frozen=True)
class StepResult:
    """Sums of one optimizer step over all ranks and micro-batches, on the host.

    Attributes:
        nll_M, labels_M: Sum of the label losses (nats), and number of labels, by the modality of the label.
        balance, z: Balance loss and z-loss as added to the loss, coefficients included.
        auxiliary: Loss of auxiliary routers or of router tuning as added to the loss; 0 if the run has neither.
        grad_norm: Global norm of the gradient before clipping; not finite if a gradient is not finite.
        skipped: True if no rank took the step, because the loss or a gradient was not finite.
        tokens: Input tokens without padding.
        ledger: Counts of bytes and rows in dispatch and combine (`moe_dist.moe.dispatch.ledger`).
        comm_seconds: Seconds inside dispatch and combine collectives, mean over ranks.
        busy_seconds_W: Seconds that each rank computed and read data in the previous step, without waits for other ranks;
            empty in the first step.
        memory_W3: `largest_memory` of each rank at the end of the previous step; empty in the first step.
        busiest_G: Largest `Forwarded.busiest_G` of all ranks in the previous step; 0 if unknown, empty in the first step.
        stop_requested: True if a rank got a stop signal.
        mixture_of_depths: Statistics of the mixture-of-depths layers; None if the model has none.
    """

    nll_M: np.ndarray
    labels_M: np.ndarray
    balance: float
    z: float
    auxiliary: float
    grad_norm: float
    skipped: bool
    tokens: int
    counts: RoutingCounts[np.ndarray]
    ledger: Mapping[str, int]
    comm_seconds: float
    busy_seconds_W: np.ndarray
    memory_W3: np.ndarray
    busiest_G: np.ndarray = field(default_factory=lambda: np.zeros(0))
    stop_requested: bool = False
    mixture_of_depths: DepthStatistics | None = None
