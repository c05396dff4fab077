"""Functions for expert-parallel layers in a user's own model (docs/api.md): balance loss, gradients and full weights.

Each expert is on one rank of `ep_group`. Only that rank gets the expert's gradients, from the tokens of all ranks.
Frameworks that average gradients over ranks, like DDP, must therefore leave out the experts. No rank has the weights or
gradients of all experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats, joined, pack, sum_over, unpack
from moe_dist.errors import ConfigError
from moe_dist.model.initial_weights import normal_tensor
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.planning import DispatchPlanner
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.zero_computation import ZeroComputationExperts, has_zero_computation_experts
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import LayerReport
from moe_dist.placement.parameter_names import EXPERTS, Role, group_module, named_parameters
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


def build_moe_layer(
    hidden_dim: int,
    groups: Sequence[ExpertGroup],
    *,
    ep_group: dist.ProcessGroup | None = None,
    placement: ExpertPlacement | None = None,
    router: nn.Module | None = None,
    seed: int = 0,
    std: float = 0.02,
    name: str = "moe",
) -> MoELayer:
    """Builds an MoE layer that has this rank's experts and exchanges tokens over `ep_group`.

    `y, report = layer(x, group)` takes x [T, D] and int64 group indices [T], and returns y [T, D] without the residual.
    Weights are normal with standard deviation `std`. They depend only on `seed` and logical name.

    Args:
        hidden_dim: The hidden dimension D of the tokens.
        groups: All groups of experts, in logical order. If no group has a `first_expert`, the experts are numbered in the
            order of `groups`.
        ep_group: The ranks over which the experts are divided. Without `ep_group`, this process has all experts.
        placement: The map of experts to ranks. By default each group's experts are spread over all ranks.
        router: The layer's router, whose weights are not changed. Without `router`, the layer gets a new `TopKRouter`.
        name: Name of the layer in logical names and error messages. Each layer of a model needs a different name.

    Raises:
        ConfigError: the groups of `placement` differ from `groups`.
        ValueError: in forward, x or group has a wrong shape, or a group index is neither -1 nor the index of a group.
            Indices are checked only on CPUs, because on a GPU the check would cost a host sync.
    """
    wire = AllToAll(ep_group, CommStats())
    groups = _numbered(groups)
    if placement is not None and tuple(groups) != placement.groups:
        raise ConfigError("groups differ from placement.groups; give build_moe_layer the groups of the placement")
    placement = placement or ExpertPlacement.interleaved(groups, wire.size)
    local = [placement.local_experts(wire.rank, group) for group in groups]
    layer = MoELayer(
        norm=nn.Identity(),
        router=router or TopKRouter(RouterContext(hidden_dim, groups)),
        experts=Experts(hidden_dim, groups, [len(experts) for experts in local]),
        dispatcher=AllToAllDispatcher(DispatchContext(placement, wire)),
        free=ZeroComputationExperts(hidden_dim, groups) if has_zero_computation_experts(groups) else None,
        name=name,
    )
    with torch.no_grad():
        for _, within, role, parameter in named_parameters(layer):
            if role is not Role.EXPERT and not (router and within.startswith("router.")):
                parameter.copy_(normal_tensor(f"{name}.{within}", tuple(parameter.shape), seed=seed, std=std))
        for experts, stack in zip(local, layer.experts.children(), strict=True):
            for tensor, parameter in stack.named_parameters():
                for weight, expert in zip(parameter, experts, strict=True):
                    logical = f"{name}.experts.{placement.name_of(expert)}.{tensor}"
                    weight.copy_(normal_tensor(logical, tuple(weight.shape), seed=seed, std=std))
    layer.register_forward_pre_hook(partial(_check_inputs, hidden_dim=hidden_dim, num_groups=len(groups)))
    return layer


def _check_inputs(layer: nn.Module, inputs: tuple[Any, ...], *, hidden_dim: int, num_groups: int) -> None:
    x_TD, group_T = inputs[:2]
    if x_TD.ndim != 2 or x_TD.shape[1] != hidden_dim or group_T.shape != x_TD.shape[:1]:
        raise ValueError(
            f"{layer.name}: x is {list(x_TD.shape)} and group {list(group_T.shape)}, but the layer takes x "
            f"[tokens, {hidden_dim}] and group [tokens]; flatten sequences and positions into one dimension"
        )
    if group_T.device.type == "cpu" and group_T.numel():
        low, high = (int(each) for each in group_T.aminmax())
        if low < -1 or high >= num_groups:
            raise ValueError(
                f"{layer.name}: group has indices from {low} to {high}, but the layer has {num_groups} groups; give 0 to "
                f"{num_groups - 1}, or -1 for padding"
            )


def _numbered(groups: Sequence[ExpertGroup]) -> Sequence[ExpertGroup]:
    if any(group.first_expert for group in groups):
        return groups
    firsts = accumulate((group.num_experts for group in groups), initial=0)
    return [replace(group, first_expert=first) for group, first in zip(groups, firsts, strict=False)]


def balance_loss(
    reports: LayerReport | Sequence[LayerReport],
    groups: Sequence[ExpertGroup],
    group: dist.ProcessGroup | None = None,
    *,
    averaged: bool = False,
) -> Tensor:
    """Returns this rank's part of AdaMoE's load-balance loss (arXiv 2406.13233, section 3.2), 0-d, with coefficient 1,
    summed over layers. The parts of all ranks add up to the loss. Costs one small all-reduce.

    Args:
        reports: The report that a layer returned, or the reports of several layers, which must have equal groups.
        groups: The layers' expert groups.
        group: Process group of all ranks that train the model; None for one process.
        averaged: Whether gradients are averaged over ranks (see `average_over_ranks`) instead of summed. If True, this
            rank's part is multiplied by the number of ranks.
    """
    layers = [reports] if isinstance(reports, LayerReport) else reports
    local, aux = joined([each.counts for each in layers]), joined([each.aux for each in layers])
    both = (local.choices_LC, local.tokens_LG)
    choices_LC, tokens_LG = unpack(sum_over(pack(both), group), both)
    tables = ColumnTables.on(tuple(groups), choices_LC.device)
    share = balance_terms(aux.prob_LC, choices_LC, tokens_LG, tables).sum()
    return share * group.size() if averaged and group is not None else share


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of this rank's experts, in all layers of a model."""
    return [each.parameter for each in named_parameters(model) if each.role in EXPERTS]


def finish_gradients(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, copies: dist.ProcessGroup | None = None
) -> None:
    """Sums gradients over ranks. Call it between backward and optimizer step, if the loss is the sum of the ranks' losses.

    For each dtype, costs an all-reduce of all dense gradients, a buffer of their size, and a host sync. A parameter that no
    rank used gets no gradient.

    Args:
        group: All ranks that train the model; None for one process.
        copies: The ranks that have copies of this rank's experts, if several EP groups train the model.
    """
    experts = {id(parameter) for parameter in expert_parameters(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _sum_gradients([parameter for parameter in trained if id(parameter) not in experts], group)
    _sum_gradients([parameter for parameter in trained if id(parameter) in experts], copies)


def _sum_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
    if group is None or group.size() == 1:
        return
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        # If this rank's tokens did not use a parameter, its gradient is None here, but may exist on other ranks.
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in same]
        used = torch.tensor([each.grad is not None for each in same], dtype=dtype).to(same[0].device)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), used])
        dist.all_reduce(flat, group=group)
        *parts, used = flat.split([*(gradient.numel() for gradient in gradients), len(same)])
        for parameter, part, by_any in zip(same, parts, used.tolist(), strict=True):  # host sync
            parameter.grad = part.view_as(parameter) if by_any else None


def average_over_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Prepares a model for a framework that averages gradients over ranks: DDP, FSDP2, Accelerate, Lightning, Trainer.

    Call this function once, before the framework wraps the module, on the module that it will wrap. Afterwards each
    gradient of an expert is divided by the number of ranks, and DDP leaves out the experts. Give FSDP2
    `ignored_params=set(expert_parameters(model))`.

    Args:
        group: All ranks that train the model, which must be one EP group; None for one process.
    """
    size = 1 if group is None else group.size()
    paths: list[str] = []
    for path, _, role, parameter in named_parameters(model):
        if role in EXPERTS:
            paths.append(path)
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / size)
    others = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [*others, *paths]  # pyright: ignore[reportArgumentType]  # DDP reads this attribute


def clip_gradients(model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Scales all gradients so that their norm over all ranks is at most `max_norm`. Returns the norm before scaling, 0-d.

    `torch.nn.utils.clip_grad_norm_` sees only this rank's experts, so it would scale by a different factor on each rank.

    Args:
        group: All ranks that train the model, which must be one EP group; None for one process.
    """
    experts = expert_parameters(model)
    known = {id(parameter) for parameter in experts}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in known and parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in dense if parameter.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    gradients = [parameter.grad for parameter in experts if parameter.grad is not None]
    own = nn.utils.get_total_norm(gradients).to(norm) if gradients else torch.zeros_like(norm)
    total = (norm.square() + sum_over(own.square(), group)).sqrt()
    nn.utils.clip_grads_with_norm_(dense, max_norm, total)
    nn.utils.clip_grads_with_norm_(experts, max_norm, total)
    return total


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's state dict, equal on all ranks, in which each stack contains all experts in logical order. All
    ranks must call it. Costs a broadcast per weight matrix of an expert. Layers must be from `build_moe_layer`."""
    state = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in model.state_dict().items()}
    for path, stack, experts, planner in _expert_stacks(model):
        local = planner.placement.local_experts(planner.wire.rank, experts)
        whole = stack.new_empty((experts.num_experts, *stack.shape[1:]))
        for expert, weight in zip(experts.experts, whole, strict=True):
            if expert in local:
                weight.copy_(stack.detach()[local.index(expert)])
            if planner.wire.group is not None:
                owner = planner.placement.rank_of_expert[expert]
                dist.broadcast(weight, group=planner.wire.group, group_src=owner)
        state[path] = whole
    return state


def load_full_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a result of `full_state_dict`, for any ranks and placement. Raises RuntimeError if names or shapes differ."""
    own = dict(state)
    for path, _, experts, planner in _expert_stacks(model):
        if path in state and len(state[path]) == experts.num_experts:  # other shapes are reported by load_state_dict
            local = planner.placement.local_experts(planner.wire.rank, experts)
            own[path] = state[path][[expert - experts.first_expert for expert in local]]
    for name, mine in model.state_dict().items():
        if isinstance(mine, DTensor) and name in own:  # sharded by FSDP2
            own[name] = distribute_tensor(own[name], mine.device_mesh, mine.placements)
    model.load_state_dict(own)


def _expert_stacks(model: nn.Module) -> Iterator[tuple[str, Tensor, ExpertGroup, DispatchPlanner]]:
    """Yields the path, parameter and expert group of each stack of experts, and its layer's planner."""
    for name, layer in model.named_modules():
        if isinstance(layer, MoELayer) and isinstance(layer.dispatcher, AllToAllDispatcher):
            planner = layer.dispatcher.planner
            for experts in planner.placement.groups:
                module = f"experts.{group_module(experts.name)}"
                for tensor, stack in layer.get_submodule(module).named_parameters():
                    yield ".".join(filter(None, [name, module, tensor])), stack, experts, planner
