"""Describes the MoE layer for Megatron's distributed checkpoints with logical names that do not depend on ranks:

    <prefix>experts.<group>.<index in the group>.<gate|up|down>      [F, D] or [D, F]
    <prefix>router.<group>.<true|null>                                replicated over TP and DP

`sharded_offsets` places a layer's tensor in a joint tensor of all layers, which Megatron stores with a first axis for
layers. A rank's stack of experts is one parameter. A factory splits it into experts before saving, and stacks the experts
again after loading. The factory treats the optimizer's states in the same way.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from moe_dist.placement.parameter_names import group_module, logical_name

Offsets = tuple[tuple[int, int, int], ...]


def sharded_layer_state(
    layer: Any, prefix: str, sharded_offsets: Offsets, metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the layer's sharded state for `dist_checkpointing`, with the keys of the layer's state dict. Each expert is a
    separate entry, so that a checkpoint can be loaded with any EP size and placement."""
    state: dict[str, Any] = {}
    for name in ("router", "shared"):
        module = getattr(layer.moe, name)
        if module is not None:
            offsets: Any = sharded_offsets  # typed as Any, because Megatron's annotation allows exactly one offset
            local = sharded_state_dict_default(module, f"{prefix}{name}.", offsets, metadata, tp_group=layer.tp_group)
            for key, value in local.items():
                if isinstance(value, ShardedBase):
                    value.key = logical_name(value.key)
                state[f"{prefix}moe.{key.removeprefix(prefix)}"] = value
    replica = (0, 0, layer.expert_data_parallel_group.rank())  # of a tensor's replicas, only replica 0 is written
    for group in layer.placement.groups:
        experts = layer.placement.local_experts(layer.ep_rank, group)
        indices = [expert - group.first_expert for expert in experts]
        module = group_module(group.name)
        for name, stack in layer.moe.experts.get_submodule(module).named_parameters():
            key = f"{prefix}experts.{group.name}.{name}"
            state[f"{prefix}moe.experts.{module}.{name}"] = (
                _factory(key, stack, indices, sharded_offsets, replica) if indices else LocalNonpersistentObject(stack)
            )
    return state


def _factory(
    key: str, stack: Tensor, indices: list[int], offsets: Offsets, replica: tuple[int, int, int]
) -> ShardedTensorFactory:
    """Makes a factory that splits a stack [e, ...] into one sharded tensor per expert, and joins them after loading."""

    @torch.no_grad()
    def cut(key: str, stack: Tensor, replica_id: Any, _flattened_range: Any) -> dict[str, ShardedTensor]:
        stem, _, name = key.rpartition(".")
        return {
            str(index): ShardedTensor.from_rank_offsets(
                f"{stem}.{index}.{name}", weight, *offsets, replica_id=replica_id, prepend_axis_num=len(offsets)
            )
            for index, weight in zip(indices, stack, strict=True)
        }

    def join(parts: dict[str, Tensor]) -> Tensor:
        return torch.stack([parts[str(index)] for index in indices])

    return ShardedTensorFactory(key, stack, cut, join, replica)
