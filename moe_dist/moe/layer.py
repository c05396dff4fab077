"""The mixture-of-experts layer: norm, router, dispatch, experts, combine. Nothing is kept on the module or in globals."""

from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.dispatch.interface import Dispatcher
from moe_dist.moe.experts import Experts
from moe_dist.moe.routing import NO_REQUEST, LayerReport, Routing, RoutingCache, RoutingRequest
from moe_dist.moe.zero_computation import ZeroComputationExperts

Recompute = Literal["none", "experts", "block"]


class Router(Protocol):
    """Any module that routes T tokens inside their groups."""

    def __call__(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing: ...


class MoELayer(nn.Module):
    """y = experts(norm(x)) (+ zero-computation experts) (+ shared expert); the caller adds the residual.

    Args:
        norm: Applied before the router, or identity.
        router: Who goes where; returns assignments and local sums.
        experts: This rank's true experts.
        dispatcher: Brings rows to their experts' ranks and back.
        shared: An expert that sees every token, or None.
        free: Identity and constant experts, where a group has any.
        recompute: `none`; `experts` recomputes the FFN between the exchanges (repeats no exchange); `block` recomputes the
            whole layer (repeats the dispatch exchange; the routing, its counts and ids are kept).
        name: Name of the layer in reports of a hang or of damage.
    """

    def __init__(
        self,
        *,
        norm: nn.Module,
        router: nn.Module,
        experts: Experts,
        dispatcher: Dispatcher[Any],
        shared: nn.Module | None = None,
        free: ZeroComputationExperts | None = None,
        recompute: Recompute = "none",
        name: str = "",
    ) -> None:
        super().__init__()
        self.norm = norm
        self.router = router
        self.experts = experts
        self.shared = shared
        self.free = free
        self.dispatcher = dispatcher
        self.recompute: Recompute = recompute
        self.name = name

    def forward(self, x_TD: Tensor, group_T: Tensor, request: RoutingRequest = NO_REQUEST) -> tuple[Tensor, LayerReport]:
        """x [T, D] and the tokens' groups (int64, -1 for padding) -> y [T, D] and the layer's report."""
        cache = RoutingCache(batch_info=request.batch_info, probe_tokens_A=request.probe_tokens_A)
        if self.recompute == "block" and x_TD.requires_grad:
            return checkpoint(  # pyright: ignore[reportReturnType]
                self._forward, x_TD, group_T, cache, request.experts_off, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x_TD, group_T, cache, request.experts_off)

    def _forward(self, x_TD: Tensor, group_T: Tensor, cache: RoutingCache, experts_off: bool) -> tuple[Tensor, LayerReport]:
        h_TD = self.norm(x_TD)
        assignments, sums, zero_weight_TF, prob_AC = self.router(h_TD, group_T, cache)
        repeated = cache.plan is not None
        plan: Any = cache.plan or self.dispatcher.plan(assignments, h_TD.shape[0], layer=self.name)
        cache.plan = plan
        # No op after combine may save a tensor for backward; otherwise block recompute repeats the combine all-to-all.
        zero_TD = None if self.free is None or zero_weight_TF is None else self.free(h_TD, zero_weight_TF)
        y_TD, shared_TD = self.dispatcher.run(
            h_TD,
            assignments.weight_N,
            plan,
            experts=partial(self.experts, recompute=self.recompute == "experts"),
            shared=self.shared,
            repeated=repeated,
        )
        if zero_TD is not None:
            y_TD = y_TD + zero_TD
        if experts_off:
            y_TD = y_TD * 0.0  # after combine, so that every rank issues the same collectives
        report = LayerReport(
            sums=sums,
            rows_remote=plan.num_remote_rows,
            pairs=plan.num_pairs,
            pairs_remote=plan.num_remote_pairs,
            prob_AC=prob_AC,
        )
        return (y_TD if shared_TD is None else y_TD + shared_TD), report
