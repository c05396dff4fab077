"""Balance and z losses inside Megatron: Megatron's scaler adds their gradients in backward, its tracker logs them.

As in `moe_dist.train.loss`, the counts are those of one micro-batch over all ranks of the pipeline stage (TP x CP x DP).
They need one all-reduce of a few integers per layer, only with gradients enabled, so Megatron's full recompute does not
repeat it.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.moe.losses import ColumnTables, balance_terms, z_terms
from moe_dist.moe.routing import RouterSums
from moe_dist.placement.placement import ExpertGroup

# (name, this rank's share of the value, layer number, number of layers, group over which the shares are summed)
Record = Callable[[str, Tensor, int, int, dist.ProcessGroup], None]


@dataclass(frozen=True)
class AuxTerms:
    """The auxiliary terms of one layer.

    Attributes:
        groups: All expert groups, in logical order.
        kind: Kind of the balance loss, as in `moe_dist.moe.losses`.
        balance, z: Coefficients; 0 leaves a term out.
        every_rank: Megatron's group of all ranks with tokens: TP x CP x DP of one pipeline stage.
        data_parallel_size: Size of DP without CP.
        per_token_loss: Whether Megatron divides gradients by the step's number of tokens, not by micro-batches and DP.
        layer_number, num_layers: Layer number for the tracker, from 1, and number of layers.
    """

    groups: Sequence[ExpertGroup]
    kind: Literal["null_averaged", "vanilla"]
    balance: float
    z: float
    every_rank: dist.ProcessGroup
    data_parallel_size: int
    per_token_loss: bool
    layer_number: int
    num_layers: int
    record: Record

    def attach(self, y: Tensor, sums: RouterSums) -> Tensor:
        """Returns `y` unchanged, and adds the terms' gradients to its backward. One all-reduce, unless both are off."""
        if not (self.balance or self.z) or not torch.is_grad_enabled():  # also skips the first forward of full recompute
            return y
        num_columns = sums.choices_C.shape[0]
        counts = sum_over(torch.cat([sums.choices_C, sums.tokens_G]), self.every_rank)[None]
        choices_LC, tokens_LG = counts[:, :num_columns], counts[:, num_columns:]
        tables = ColumnTables.on(self.groups, y.device)
        balance = balance_terms(sums.prob_C[None], choices_LC, tokens_LG, tables, kind=self.kind).sum()
        z = z_terms(sums.log_z_squared_G[None], tokens_LG).sum()
        # Megatron sums the gradients over TP. Then it averages over DP x CP (its scaler has CP / micro-batches), or divides
        # their sum by the step's tokens. The factor makes the shares of all ranks sum to the term.
        scale = tokens_LG.sum() if self.per_token_loss else float(self.data_parallel_size)
        for name, term, coefficient in (("global_load_balancing_loss", balance, self.balance), ("z_loss", z, self.z)):
            if coefficient:
                self.record(name, term, self.layer_number, self.num_layers, self.every_rank)
                # adds the gradient in backward without changing y
                y = MoEAuxLossAutoScaler.apply(y, coefficient * scale * term)
        return y


def tracker() -> Record:
    """Adds a value to Megatron's tracker, which reduces and prints it: an object in newer versions, a function in 0.16."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        return _record_in_object
    return _record_by_function


def _record_in_object(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    from megatron.core.transformer.moe.moe_logging import (  # pyright: ignore[reportMissingImports]
        get_moe_metrics_tracker,
    )

    get_moe_metrics_tracker().record(name, value, layer, num_layers, reduce_group=group, needs_dp_avg=False)


def _record_by_function(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

    save_to_aux_losses_tracker(name, value, layer, num_layers, reduce_group=group, reduce_group_has_dp=True)
