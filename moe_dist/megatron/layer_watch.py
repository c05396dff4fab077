"""Connects the engine with every MoE layer: adds the step's auxiliary terms to the layers' backward, and sums the layers'
reports over the step's micro-batches.

Shape letters: L MoE layers of the whole model, C choice columns, G groups, E true experts, T tokens of this rank.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats, added, pack, sum_over, unpack
from moe_dist.comm.names import ROUTING_COUNTS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.schema import Config
from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.losses import AuxSettings, BalanceKind, ColumnTables, balance_terms, z_terms
from moe_dist.moe.routing.counts import AuxSums, RoutingCounts, SentCounts
from moe_dist.moe.routing.types import NO_REQUEST, ChosenColumns, LayerReport, RoutingRequest
from moe_dist.placement.placement import ExpertPlacement


class LayerWatch:
    """Gives all MoE layers on this rank their routers and dispatcher, adds auxiliary terms, and collects reports.

    Args:
        tracker: Records the collectives of all layers for the watchdog.
        comm_stats: Counts the bytes and seconds of all layers' exchanges.

    Attributes:
        coefficients: Coefficients of the auxiliary terms in a step; None in evaluation.
        routers: The router of each MoE layer on this rank, by layer index.
        request: The request that routers get with the current micro-batch.
        chosen: For each micro-batch (by number) and layer, each token's index in the micro-batch [T], and the choices. It
            contains only micro-batches whose request asks for choices.
        activation: The activation of every expert.
        static: Whether exchanges have fixed sizes, so that the host does not know how many rows are exchanged.
        every_rank: Megatron's group TP x CP x DP: all ranks of a stage that have tokens of a micro-batch. Set by `Gpt`.
    """

    every_rank: dist.ProcessGroup

    def __init__(
        self,
        placement: ExpertPlacement,
        config: Config,
        device: torch.device,
        make_router: Callable[[int], nn.Module],
        tracker: CollectiveTracker,
        comm_stats: CommStats,
        dispatcher: Dispatcher[Any],
    ) -> None:
        self._make_router, self.tracker = make_router, tracker
        self.routers: dict[int, nn.Module] = {}
        self._placement, self._layers, self._device = placement, config.model.moe_layers, device
        self._experts_choose, self.static = config.model.moe.router.experts_choose, config.parallel.dispatch.static
        self.activation = config.model.moe.experts.build()
        self._tables = ColumnTables.on(placement.groups, device)
        self.coefficients: AuxSettings | None = None
        self.comm_stats, self.dispatcher = comm_stats, dispatcher
        self.request = NO_REQUEST
        self.chosen: dict[int, dict[int, tuple[Tensor, ChosenColumns]]] = defaultdict(dict)
        self._reports: dict[int, list[LayerReport]] = defaultdict(list)
        self._terms: list[Tensor] = []  # one [balance, z] for each layer and micro-batch

    def make_router(self, layer: int) -> nn.Module:
        """Makes the router of a layer on this rank, and adds it to `routers`."""
        self.routers[layer] = self._make_router(layer)
        return self.routers[layer]

    def begin(self, number: int, share: Tensor, request: RoutingRequest) -> None:
        """Prepares the forward of a micro-batch through one part of the model.

        Args:
            share: Weight of the micro-batch in the step, 0-d.
            request: Contains each token's index in the micro-batch, for the tokens of this rank.
        """
        self._number, self._share, self.request = number, share, request

    def __call__(self, layer: int, y_TD: Tensor, report: LayerReport) -> Tensor:
        """Returns `y_TD` in a form whose backward also adds the gradients of the auxiliary terms. In training it costs one
        all-reduce, unless both coefficients are 0."""
        self._reports[layer].append(_detached(report))
        if report.chosen is not None:
            assert self.request.token_T is not None
            self.chosen[self._number][layer] = (self.request.token_T, report.chosen)
        aux = self.coefficients
        if aux is None or not (aux.balance or aux.z):
            return y_TD
        balance, z, _ = layer_terms(
            report, self._tables, self.every_rank, kind=aux.kind, null_weight_G=aux.null_weight_G, tracker=self.tracker
        )
        balance, z = aux.balance * self._share * balance, aux.z * self._share * z
        self._terms.append(torch.stack([balance.detach(), z.detach()]).to(torch.float64))
        return MoEAuxLossAutoScaler.apply(y_TD, (balance + z).to(torch.float32))  # pyright: ignore[reportReturnType]

    def take(self) -> tuple[list[LayerReport], Tensor]:
        """Returns the data collected since the last call, and clears them: for each MoE layer of the model a report summed
        over micro-batches (zeros for layers of other stages), and the sums of balance and z terms, float64 [2]."""
        found = [added(self._reports[layer]) if self._reports[layer] else self._nothing() for layer in self._layers]
        terms = torch.stack(self._terms).sum(0) if self._terms else torch.zeros(2, dtype=torch.float64, device=self._device)
        self._reports.clear()
        self._terms.clear()
        return found, terms

    def _nothing(self) -> LayerReport:
        groups = self._placement.groups
        columns, experts = sum(group.num_columns for group in groups), self._placement.num_experts

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)

        by_C, by_E, by_G = zeros(1, columns), zeros(1, experts), zeros(1, len(groups))
        counts = RoutingCounts(by_C, by_G, by_G, by_E)
        if self._experts_choose:
            counts = counts._replace(kth_score_LE=by_E, above_LE=by_E, unrouted_LG=by_G)
        return LayerReport(counts, AuxSums(by_C, by_G), zeros(5) if self.static else SentCounts(0, 0, 0))


def layer_terms(
    report: LayerReport,
    tables: ColumnTables,
    every_rank: dist.ProcessGroup,
    *,
    kind: BalanceKind,
    null_weight_G: Sequence[float] | None = None,
    tracker: CollectiveTracker | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for one layer and micro-batch, this rank's parts of the balance loss and z loss (each with coefficient 1),
    and the total number of tokens of all ranks. As in this project's own engine, a rank divides its sums by counts over all
    ranks, for which it needs one all-reduce."""
    local, aux = (report.counts.choices_LC, report.counts.tokens_LG), report.aux
    choices_LC, tokens_LG = unpack(sum_over(pack(local), every_rank, name=ROUTING_COUNTS, tracker=tracker), local)
    balance_LG = balance_terms(aux.prob_LC, choices_LC, tokens_LG, tables, kind=kind, null_weight_G=null_weight_G)
    return balance_LG.sum(), z_terms(aux.log_z_squared_LG, tokens_LG).sum(), tokens_LG.sum()


def _detached(report: LayerReport) -> LayerReport:
    """Returns a report with the same counts, and with sums that are detached from the autograd graph."""
    aux = AuxSums(report.aux.prob_LC.detach(), report.aux.log_z_squared_LG.detach())
    return LayerReport(report.counts, aux, report.sent)
