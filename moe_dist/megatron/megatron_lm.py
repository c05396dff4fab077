"""The router, the dispatcher and the auxiliary terms of an MoE layer inside Megatron-LM.

Megatron's scaler adds the gradients of balance loss and z loss in backward, and Megatron's tracker logs both losses. As in
`moe_dist.train.objective.loss`, both use a micro-batch's counts over all ranks of the pipeline stage (TP x CP x DP).
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.megatron.layer_watch import layer_terms
from moe_dist.megatron.settings import ExpertSettings
from moe_dist.megatron.versions import record
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.losses import ColumnTables
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport
from moe_dist.placement.placement import ExpertPlacement


class UntimedCommStats(CommStats):
    """Counts bytes, but measures no wait times, because Megatron's training loop would never collect the CUDA events."""

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        yield


class MegatronLmWatch(nn.Module):
    """Replaces `LayerWatch` for one layer, with options from Megatron's configuration and the expert settings."""

    request, static = NO_REQUEST, False

    def __init__(
        self,
        config: TransformerConfig,
        settings: ExpertSettings,
        groups: ProcessGroupCollection,
        placement: ExpertPlacement,
    ) -> None:
        super().__init__()
        self._config, self._settings, self._groups, self._placement = config, settings, groups, placement
        self.comm_stats = UntimedCommStats()
        all_to_all = AllToAll(groups.ep if groups.ep.size() > 1 else None, self.comm_stats)
        context = DispatchContext(placement, all_to_all, max_receive_rows=settings.max_receive_rows)
        self.dispatcher = AllToAllDispatcher(context)

    def make_router(self, layer: int) -> nn.Module:
        """Makes the router of the layer."""
        return self._settings.router.build(RouterContext(self._config.hidden_size, self._placement.groups, layer=layer))

    def forward(self, layer: int, y_TD: Tensor, report: LayerReport) -> Tensor:
        """Returns `y_TD`. In training, its backward also adds the gradients of the auxiliary terms."""
        return self.attach(layer, y_TD, report) if self.training else y_TD

    def attach(self, layer: int, y_TD: Tensor, report: LayerReport) -> Tensor:
        """Returns `y_TD` with the same values, but its backward also adds the gradients of both losses. Costs one
        all-reduce of a few integers, unless both coefficients are 0 or gradients are off (as in the first forward of full
        recompute)."""
        config, groups = self._config, self._groups
        balances = config.moe_router_load_balancing_type != "none"
        coefficients = (float(config.moe_aux_loss_coeff) if balances else 0.0, config.moe_z_loss_coeff or 0.0)  # pyright: ignore
        if not any(coefficients) or not torch.is_grad_enabled():
            return y_TD
        tables = ColumnTables.on(self._placement.groups, y_TD.device)
        *terms, tokens = layer_terms(report, tables, groups.tp_dp_cp, kind=self._settings.balance)
        # Megatron sums gradients over TP. Then it averages over DP x CP (its scaler has CP / micro-batches), or divides the
        # sum by the step's tokens. `scale` cancels this division, so that the parts of all ranks sum to the loss.
        data_ranks = groups.tp_dp_cp.size() // groups.tp_cp.size()
        scale = tokens if config.calculate_per_token_loss else float(data_ranks)
        for name, term, coefficient in zip(("global_load_balancing_loss", "z_loss"), terms, coefficients, strict=True):
            if coefficient:
                record(name, term, layer + 1, config.num_layers, groups.tp_dp_cp)
                y_TD = MoEAuxLossAutoScaler.apply(y_TD, coefficient * scale * term)  # pyright: ignore[reportAssignmentType]
        return y_TD
