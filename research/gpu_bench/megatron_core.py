"""Runs Megatron-Core's alltoall dispatcher and experts with our routing. megatron-core has no CPU path, so `cpu_trial`
replaces the CUDA devices and streams. The code of the dispatcher is unchanged. The dispatcher has two branches:

    default     expects K experts for each token
    capacity    counts the rows to send; the capacity factor is so large that nothing is dropped

The default branch announces T x K rows, but a null choice that is not in the routing map has no row. In megatron-core
0.19 the permutation then makes rows for null choices, too, and the exchange fails. In 0.16 the permutation ignores the
announced number. The benchmark therefore announces the number of rows in the routing map, and neither branch sends a
row for such a null choice.

Shape letters: T tokens, D hidden size, E experts, K choices per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.megatron.gpt import PLAIN
from moe_dist.moe.layer import Router
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import ABSENT, NO_REQUEST, LayerReport, RoutingRequest
from moe_dist.placement.placement import ExpertPlacement


class Variant(NamedTuple):
    """Options with which the benchmark runs Megatron's dispatcher."""

    capacity: bool = False  # use the dispatcher's capacity branch
    remapped: bool = False  # whether a null choice goes, with weight 0, to an expert that the token did not choose


def configuration(*, hidden: int, experts: int, top_k: int, ffn: int, ep: int, capacity: bool) -> Any:
    """Makes a TransformerConfig with SwiGLU experts and without auxiliary loss."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        num_moe_experts=experts,
        moe_router_topk=top_k,
        moe_router_pre_softmax=top_k == 1,  # Megatron refuses top-1 without this option; its router is not used
        moe_ffn_hidden_size=ffn,
        expert_model_parallel_size=ep,
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=float(experts) if capacity else None,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        use_cpu_initialization=True,
        moe_permute_fusion=False,
        **PLAIN,
    )


def column_of_expert(placement: ExpertPlacement) -> Tensor:
    """Returns for each logical expert its column in Megatron's routing tables, int64 [E]. Megatron numbers the experts of
    rank 0 first, then those of rank 1, and so on. It needs the same number of experts on each rank."""
    order = [expert for rank_slots in placement.slots for expert in rank_slots]
    if len({len(rank_slots) for rank_slots in placement.slots}) > 1:
        raise ValueError("megatron-core needs the same number of experts on each rank")
    column_E = torch.empty(len(order), dtype=torch.int64)
    column_E[torch.tensor(order)] = torch.arange(len(order))
    return column_E


def dispatcher_of(config: Any, ep_rank: int) -> Any:
    """Makes Megatron's alltoall dispatcher. Each rank has a contiguous range of experts."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    local = config.num_moe_experts // config.expert_model_parallel_size
    indices = list(range(ep_rank * local, (ep_rank + 1) * local))
    return MoEAlltoAllTokenDispatcher(local, indices, config=config, pg_collection=get_default_pg_collection())


def routing_tables(expert_TK: Tensor, weight_TK: Tensor, column_E: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weights [T, E] and the boolean map [T, E] of the (token, expert) pairs to send, as Megatron's router
    does. The weights are differentiable. Takes O(T x E) memory."""
    present_TK = expert_TK != ABSENT
    column_TK = torch.where(present_TK, column_E[expert_TK.clamp_min(0)], column_E.shape[0])
    shape = (expert_TK.shape[0], column_E.shape[0] + 1)  # absent choices go to an extra last column
    weights = weight_TK.new_zeros(shape).scatter(1, column_TK, weight_TK)
    taken = torch.zeros(shape, dtype=torch.bool, device=expert_TK.device).scatter_(1, column_TK, present_TK)
    return weights[:, :-1], taken[:, :-1].contiguous()


class MegatronMoE(nn.Module):
    """Our norm and router, followed by Megatron-Core's dispatcher and experts. Replaces one of our `MoELayer`s."""

    _column_E: Tensor

    def __init__(
        self,
        norm: nn.Module,
        router: nn.Module,
        placement: ExpertPlacement,
        variant: Variant,
        *,
        hidden: int,
        ep_rank: int,
    ) -> None:
        super().__init__()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        groups = placement.groups
        config = configuration(
            hidden=hidden,
            experts=placement.num_experts,
            top_k=max(group.top_k for group in groups),
            ffn=groups[0].ffn_dim,
            ep=placement.num_ranks,
            capacity=variant.capacity,
        )
        # get_moe_module_spec returns a ModuleSpec in 0.16 and a functools.partial in 0.19.
        spec: Any = get_moe_module_spec(use_te=False, num_experts=placement.num_experts, moe_grouped_gemm=False)
        submodules = spec.submodules if hasattr(spec, "submodules") else spec.keywords["submodules"]
        layer: Any = MoELayer(config, submodules=submodules, layer_number=1)
        self.norm, self.router, self.experts = norm, router, layer.experts
        self.remapped = variant.remapped
        self._dispatcher = layer.token_dispatcher
        self.register_buffer("_column_E", column_of_expert(placement), persistent=False)
        self._group_of_E = torch.tensor([i for i, group in enumerate(groups) for _ in range(group.num_experts)])

    def forward(self, x_TD: Tensor, group_T: Tensor, request: RoutingRequest = NO_REQUEST) -> tuple[Tensor, LayerReport]:
        h_TD = self.norm(x_TD)
        router: Router = self.router  # pyright: ignore[reportAssignmentType]
        routing = router(h_TD, group_T)
        assignments = routing.assignments
        expert_TK = assignments.expert_N.view(h_TD.shape[0], -1)
        weight_TK = assignments.weight_N.view_as(expert_TK)
        pairs = int((expert_TK != ABSENT).sum())  # would sync with a CUDA device, but the bench runs on the CPU
        rows = pairs
        if self.remapped:
            expert_TK, rows = self._remapped(expert_TK, group_T), expert_TK.numel()
        probs_TE, map_TE = routing_tables(expert_TK, weight_TK, self._column_E)
        y_TD = run_experts(self._dispatcher, self.experts, h_TD, probs_TE, map_TE, rows)
        return y_TD, LayerReport(routing.counts, routing.aux, SentCounts(rows_remote=0, pairs=pairs, pairs_remote=0))

    def _remapped(self, expert_TK: Tensor, group_T: Tensor) -> Tensor:
        """Replaces each absent choice of a token by the next expert of the token's group that the token did not choose."""
        used_TE = torch.zeros(expert_TK.shape[0], self._column_E.shape[0] + 1, dtype=torch.bool)
        used_TE.scatter_(1, torch.where(expert_TK == ABSENT, self._column_E.shape[0], expert_TK), True)
        used_TE = used_TE[:, :-1] | (self._group_of_E != group_T[:, None])
        free_TE = torch.sort(used_TE.to(torch.int8), dim=1, stable=True).indices  # unused experts come first
        nth_TK = ((expert_TK == ABSENT).cumsum(1) - 1).clamp_min(0)
        return torch.where(expert_TK == ABSENT, free_TE.gather(1, nth_TK), expert_TK)


def run_experts(dispatcher: Any, experts: Any, h_TD: Tensor, probs_TE: Tensor, map_TE: Tensor, pairs: int) -> Tensor:
    """Runs Megatron's forward from the router's result to the output, in the same order as Megatron's MoELayer. `pairs`
    is the number of (token, expert) pairs in the routing map."""

    def preprocess(map_TE: Tensor) -> Tensor:
        tokens_per_expert = type(dispatcher).preprocess(dispatcher, map_TE)
        dispatcher.num_out_tokens = pairs
        return tokens_per_expert

    dispatcher.preprocess = preprocess
    rows, probs = dispatcher.dispatch_preprocess(h_TD, map_TE, probs_TE)
    rows, probs = dispatcher.token_dispatch(rows, probs)
    rows, tokens_per_expert, probs = dispatcher.dispatch_postprocess(rows, probs)
    outputs, _ = experts(rows, tokens_per_expert, probs)
    return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(outputs)))


@torch.no_grad()
def copy_experts(ours: nn.Module, theirs: Any) -> None:
    """Copies this rank's expert weights, in slot order, into Megatron's experts. Their matrix fc1 has the gate rows, then
    the up rows."""
    stacks = [module for module in ours.children() if hasattr(module, "gate")]
    gate, up, down = (torch.cat([getattr(stack, name) for stack in stacks]) for name in ("gate", "up", "down"))
    for index, expert in enumerate(theirs.local_experts):
        expert.linear_fc1.weight.copy_(torch.cat([gate[index], up[index]]))
        expert.linear_fc2.weight.copy_(down[index])
