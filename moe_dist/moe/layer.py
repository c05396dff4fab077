"""The mixture-of-experts layer: norm, router, dispatch, experts and combine. `forward` sets no attribute of the module."""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from moe_dist.moe.dispatch.interface import DispatchedRows, Dispatcher, RunExperts
from moe_dist.moe.dispatch.two_batches import Chain, TwoBatchDispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts
from moe_dist.moe.routing.draws import recomputed
from moe_dist.moe.routing.types import NO_REQUEST, LayerReport, Recompute, Routing, RoutingCache, RoutingRequest


class Router(Protocol):
    """Any module that routes each of T tokens to experts of the token's group."""

    def __call__(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing: ...


class MoELayer(nn.Module):
    """y = experts(norm(x)) + zero-computation experts + shared expert. The caller adds the residual.

    With `shortcut`, y is the shared expert's output alone, and the report contains the sum of the two other terms as
    `late_TD` (LongCat-Flash, arXiv 2509.01322, section 2.2). The caller adds `late_TD` after the next layer.

    Args:
        dispatcher: Sends each token's row to the ranks of its experts, and sums the experts' outputs for each token.
        shared: An expert that processes every token on the token's rank, or None.
        free: The identity and constant experts, which need no dispatch; None if no group has such experts.
        shortcut: Whether the caller adds the routed experts' output later. Needs a shared expert.
        recompute: The part of the layer that backward computes again. `experts`: only the expert FFNs, whose recomputation
            needs no exchange. `block`: the whole layer with its dispatch exchange. Backward then reuses the choice of
            experts and the dispatch plan of forward.
        name: Name of the layer in statistics, and in error reports about hung collectives and damaged data.

    Attributes:
        around_experts: Runs the experts with the rows and the layout that the dispatcher gives; None for the experts alone.
    """

    around_experts: Callable[[RunExperts, DispatchedRows, Any], Tensor] | None = None

    def __init__(
        self,
        *,
        norm: nn.Module,
        router: nn.Module,
        experts: Experts,
        dispatcher: Dispatcher[Any],
        shared: nn.Module | None = None,
        free: ZeroComputationExperts | None = None,
        shortcut: bool = False,
        recompute: Recompute = "none",
        name: str = "",
    ) -> None:
        super().__init__()
        self.norm = norm
        self.router = router
        self.experts = experts
        self.shared = shared
        self.free = free
        self.shortcut = shortcut
        self.dispatcher = dispatcher
        self.recompute: Recompute = recompute
        self.name = name

    def forward(self, x_TD: Tensor, group_T: Tensor, request: RoutingRequest = NO_REQUEST) -> tuple[Tensor, LayerReport]:
        """Returns y [T, D] and the layer's report, for x [T, D] and each token's group (int64 [T], -1 for padding)."""
        cache = RoutingCache(
            batch_info=request.batch_info,
            probe_tokens_A=request.probe_tokens_A,
            token_T=request.token_T,
            id_T=request.id_T,
            keep_choices=request.keep_choices,
            previous_TC=request.previous_TC,
        )
        if self.recompute == "block" and x_TD.requires_grad:
            return recomputed(self.with_cache, x_TD, group_T, cache, request.experts_off)
        return self.with_cache(x_TD, group_T, cache, request.experts_off)

    def steps(
        self, x_TD: Tensor, group_T: Tensor, request: RoutingRequest, chain: Chain
    ) -> Generator[None, None, tuple[Tensor, LayerReport]]:
        """Like `forward`, but a generator: it yields while an exchange is in flight. Needs a dispatcher with `steps`."""
        assert isinstance(self.dispatcher, TwoBatchDispatcher)
        cache = RoutingCache(keep_choices=request.keep_choices)
        routed = self._route(x_TD, group_T, cache)
        found = yield from self.dispatcher.steps(*routed.inputs, chain, experts=routed.experts, shared=self.shared)
        return self._result(routed, *found, request.experts_off)

    def with_cache(
        self, x_TD: Tensor, group_T: Tensor, cache: RoutingCache, experts_off: bool
    ) -> tuple[Tensor, LayerReport]:
        """See `forward`. Keeps choices and plan in `cache`; a recomputation reads them from there."""
        repeated = cache.plan is not None  # backward recomputes the block
        routed = self._route(x_TD, group_T, cache)
        found = self.dispatcher.run(*routed.inputs, experts=routed.experts, shared=self.shared, repeated=repeated)
        return self._result(routed, *found, experts_off)

    def normed(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns two tensors: the normed input of the experts and of the router. A kernel may replace this method
        (`model.kernels.choice`); the router's tensor is then fp32."""
        h_TD = self.norm(x_TD)
        return h_TD, h_TD

    def _route(self, x_TD: Tensor, group_T: Tensor, cache: RoutingCache) -> "_Routed":
        h_TD, wide_TD = self.normed(x_TD)
        routing: Routing = self.router(wide_TD, group_T, cache)
        plan: Any = cache.plan or self.dispatcher.plan(routing.assignments, h_TD.shape[0], layer=self.name)  # host sync
        cache.plan = plan
        # No op after combine may save a tensor for backward; `recompute="block"` would then repeat combine's all-to-all.
        zero_weight_TF = routing.zero_weight_TF
        zero_TD = None if self.free is None or zero_weight_TF is None else self.free(h_TD, zero_weight_TF)
        h_TD, experts = self.experts.start(h_TD, recompute=self.recompute == "experts")
        if self.around_experts is not None:
            experts = partial(self.around_experts, experts)
        return _Routed((h_TD, routing.assignments.weight_N, plan), experts, routing, zero_TD)

    def _result(
        self, routed: "_Routed", y_TD: Tensor, shared_TD: Tensor | None, experts_off: bool
    ) -> tuple[Tensor, LayerReport]:
        if routed.zero_TD is not None:
            y_TD = y_TD + routed.zero_TD
        if experts_off:
            y_TD = y_TD * 0.0  # set to zero only after combine, so that all ranks issue the same collectives
        routing, plan = routed.routing, routed.inputs[2]
        known = {"prob_AC": routing.prob_AC, "chosen": routing.chosen, "logits_TC": routing.logits_TC}
        report = LayerReport(routing.counts, routing.aux, plan.sent, **known)
        if self.shortcut:
            assert shared_TD is not None, "the configuration demands a shared expert"
            return shared_TD, report._replace(late_TD=y_TD)
        return (y_TD if shared_TD is None else y_TD + shared_TD), report


class _Routed(NamedTuple):
    """The values that a layer computes before its first exchange of rows. `inputs` are the dispatcher's inputs: h, weights
    and plan. `experts` computes this rank's experts. `zero_TD` is the output of the zero-computation experts, or None."""

    inputs: tuple[Tensor, Tensor, Any]
    experts: RunExperts
    routing: Routing
    zero_TD: Tensor | None
