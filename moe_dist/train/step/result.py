"""The records of a training step: the results of its forward passes, the sums over all ranks, and the step's result.

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
    """The divisor and the weights of the terms of a step's loss. They are computed from counts over all ranks."""

    labels_in_step: Tensor  # number of labels on all ranks, at least 1
    share_I: Tensor  # weight of each micro-batch's auxiliary terms
    share_IG: Tensor | None  # weight of auxiliary terms by micro-batch and group; None to use `share_I`
    batch_info: Sequence[GlobalBatchInfo | None]
    source_ISB: Tensor | None = None  # float64, 1 where a sequence of a micro-batch is of source S


class Forwarded(NamedTuple):
    """Sums over the micro-batches of a step.

    Attributes:
        loss: Contribution of this rank to the step's losses.
        counts: Routing counts over all ranks.
        own, sent: Routing counts of this rank, and numbers of rows and pairs that it sent, over all layers.
        busiest_G: Largest load of an expert / even load of its group's choices, over all layers and micro-batches of this
            rank; 0 without tokens, None if unknown. With this number as capacity factor, no pair would be dropped.
        nats_S2: Sum of the losses in nats, and number of labels, by source of the data; None if unknown.
    """

    loss: MicroLoss
    counts: RoutingCounts[Tensor]
    own: RoutingCounts[Tensor]
    sent: SentCounts | Tensor
    busiest_G: Tensor | None = None
    nats_S2: Tensor | None = None


class Readings(NamedTuple):
    """Readings of all ranks. Each rank fills its own row and leaves the other rows 0. A sum over the ranks completes them.

    Attributes:
        seconds_W: Seconds that each rank spent on computing and on reading data, without waits for other ranks.
        memory_W3: Result of `train.step.training_step.largest_memory` on each rank.
        busiest_WG: `Forwarded.busiest_G` of each rank; 0 if unknown.
        digest_D, nats_D2: Columns of `StepResult.data_D3`. Here each rank fills the row of its reader.
        total_D, words_DK: See `StepResult`. Here each rank fills the row of its reader.
        nats_S2: `Forwarded.nats_S2`; empty if unknown.
    """

    seconds_W: Any
    memory_W3: Any
    busiest_WG: Any
    digest_D: Any = np.zeros(0)
    nats_D2: Any = np.zeros((0, 2))
    total_D: Any = np.zeros(0)
    words_DK: Any = np.zeros((0, 0))
    nats_S2: Any = np.zeros((0, 2))


class StepStart(NamedTuple, Generic[Number]):
    """Counts that one all-reduce sums over the ranks before the first forward pass.

    Attributes:
        labels_I: Number of labels of each micro-batch.
        readings: The ranks' readings from the previous step; empty in the first step.
        members_RIG: Number of tokens of each reader, micro-batch and group; empty if no router needs these numbers.
        tokens_IG: Number of tokens of each micro-batch and group; empty unless the balance loss uses the loads of a step.
    """

    labels_I: Number
    readings: Readings
    members_RIG: Number
    tokens_IG: Number


class StepSums(NamedTuple, Generic[Number]):
    """One rank's contribution to the numbers that an all-reduce at the end of a step sums.

    Attributes:
        norm_squared: Squared norm of the gradient.
        balance, z, auxiliary, nll_M: See `MicroLoss`.
        labels_M: Number of labels of each modality.
        ledger: See `StepResult`.
        comm_seconds: Seconds inside dispatch and combine collectives.
        tokens: Number of input tokens without padding.
        stop_requested: 1 if the rank got a stop signal.
        overflow: Number of rows and pairs that exceeded the fixed sizes of exchanges.
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
        nll_M, labels_M: Sum of the losses of labels (nats), and number of labels, by the label's modality.
        balance, z: Balance loss and z-loss as they are added to the loss, including their coefficients.
        auxiliary: Loss of auxiliary routers or of router tuning, as it is added to the loss; 0 if the run has neither.
        grad_norm: Global norm of the gradient before clipping; not finite if a gradient is not finite.
        skipped: True if no rank took the step, because the loss or a gradient was not finite.
        tokens: Number of input tokens without padding.
        ledger: Counts of bytes and rows in dispatch and combine (`moe_dist.moe.dispatch.ledger`).
        comm_seconds: Seconds inside dispatch and combine collectives, as a mean over ranks.
        busy_seconds_W: Seconds that each rank spent on computing and on reading data in the previous step, without waits
            for other ranks; empty in the first step.
        memory_W3: `largest_memory` of each rank at the end of the previous step; empty in the first step.
        busiest_G: Largest `Forwarded.busiest_G` of any rank in the previous step; 0 if unknown, empty in the first step.
        data_D3: For each reader in the previous step: checksum of its token ids (0 without tokens), sum of its losses in
            nats, and number of its labels; empty in the first step.
        total_D: The loss from which the backward of each reader began in the previous step; empty in the first step.
        words_DK: Number of token ids of each reader in the previous step, by the id modulo K; empty in the first step.
        sources_S2: For each source of the data in the previous step: sum of the losses in nats, and number of labels; empty
            in the first step, and if unknown.
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
    data_D3: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    total_D: np.ndarray = field(default_factory=lambda: np.zeros(0))
    words_DK: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    sources_S2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    stop_requested: bool = False
    mixture_of_depths: DepthStatistics | None = None
