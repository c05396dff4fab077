"""Adds balance and z losses in Megatron: Megatron's scaler adds the losses' gradients in backward, Megatron's tracker logs
the values.

As in `moe_dist.train.objective.loss`, both losses use counts of a micro-batch over all ranks of the pipeline stage
(TP x CP x DP). Each layer sums its counts by one all-reduce of a few integers, but only with gradients enabled: full
recompute thus sums the counts only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moe_dist.comm.collectives import pack, sum_over, unpack
from moe_dist.megatron.versions import Record
from moe_dist.moe.losses import ColumnTables, balance_terms, z_terms
from moe_dist.moe.routing.types import LayerReport
from moe_dist.placement.placement import ExpertGroup


@dataclass(frozen=True)
class AuxTerms:
    """The balance loss and the z loss of one layer."""

    groups: Sequence[ExpertGroup]
    kind: Literal["null_averaged", "vanilla"]  # kind of the balance loss, as in `moe_dist.moe.losses`
    balance: float  # coefficient of the balance loss; 0 for no balance loss
    z: float
    every_rank: dist.ProcessGroup  # Megatron's group TP x CP x DP: all ranks of the pipeline stage that have tokens
    data_parallel_size: int  # size of the DP group without CP
    per_token_loss: bool  # True if Megatron divides gradients by the step's tokens, not by micro-batches and DP size
    layer_number: int  # counts from 1, for the tracker
    num_layers: int
    record: Record

    def attach(self, y: Tensor, report: LayerReport) -> Tensor:
        """Returns `y` with the same values; backward through `y` also adds the gradients of both losses. Costs one
        all-reduce, unless both coefficients are 0."""
        if not (self.balance or self.z) or not torch.is_grad_enabled():  # as in the first forward of full recompute
            return y
        local, aux = (report.counts.choices_LC, report.counts.tokens_LG), report.aux
        choices_LC, tokens_LG = unpack(sum_over(pack(local), self.every_rank), local)
        tables = ColumnTables.on(tuple(self.groups), y.device)
        balance = balance_terms(aux.prob_LC, choices_LC, tokens_LG, tables, kind=self.kind).sum()
        z = z_terms(aux.log_z_squared_LG, tokens_LG).sum()
        # Megatron sums gradients over TP, and then averages them over DP x CP (its scaler has CP / micro-batches) or
        # divides the sum by the step's tokens. `scale` cancels this division, so that the ranks' shares sum to the loss.
        scale = tokens_LG.sum() if self.per_token_loss else float(self.data_parallel_size)
        for name, term, coefficient in (("global_load_balancing_loss", balance, self.balance), ("z_loss", z, self.z)):
            if coefficient:
                self.record(name, term, self.layer_number, self.num_layers, self.every_rank)
                y = MoEAuxLossAutoScaler.apply(y, coefficient * scale * term)  # y keeps its value
        return y
