"""Collects the part of a run's state that this rank has. It consists of JSON values and of tensors with logical names,
which do not depend on the layout of ranks.

    embedding.weight                                    dense and router parameters: the name in the model
    layers.{i}.moe.experts.{group}.{index}.{tensor}     each expert's own tensors; index of the expert in its group
    optimizer.{exp_avg,exp_avg_sq}.{any of the above}   AdamW's moments; Muon's matrices have only exp_avg

Every tensor shares the memory of its parameter or moment, so loading into the tensors changes the model and optimizer.
"""

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from moe_dist.optim.optimizer import MOMENTS, is_empty_here, local, materialise_moments, moments_of
from moe_dist.placement.parameter_names import EXPERTS, logical_name, named_parameters
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

OPTIMIZER_PREFIX = "optimizer."
Part = Literal["all", "trained", "frozen"]


@dataclass(frozen=True)
class RankLayout:
    """This rank's position among the ranks, and the placement of the experts on the EP ranks."""

    placement: ExpertPlacement
    rank: int = 0
    world_size: int = 1
    ep_rank: int = 0  # rank in the EP (expert-parallel) group
    edp_rank: int = 0  # rank in the EDP (expert-data-parallel) group, whose ranks have the same experts
    edp_size: int = 1


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a whole logical tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class LocalShard:
    """This rank's data of a logical tensor: the whole tensor or a shard of it."""

    tensor: Tensor  # a DTensor if it is sharded, else a plain tensor
    copies: int  # number of ranks with the same data, this rank included
    position: int  # this rank's index among the ranks with the same data


@dataclass(frozen=True)
class CheckpointState:
    """One rank's part of the state that is saved in a checkpoint or loaded from it.

    Attributes:
        held: Maps logical names to this rank's tensors.
        specs: Shape and dtype of all logical tensors of model and optimizer, including tensors that only other ranks have.
        optimizer: The optimizer whose moments `held` contains; None if `held` contains no moments.
        values: JSON values that are equal on all ranks: progress, resolved configuration, states of controllers.
        rank_values: JSON values of this rank, such as RNG states; restored only if the number of ranks is the same.
    """

    held: Mapping[str, LocalShard]
    specs: Mapping[str, TensorSpec]
    layout: RankLayout
    optimizer: Optimizer | None = None
    values: Mapping[str, JsonValue] = field(default_factory=dict)
    rank_values: Mapping[str, JsonValue] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Returns this rank's tensors by logical name. Loading a checkpoint writes directly into these tensors."""
        return {name: held.tensor for name, held in self.held.items()}

    def written(self) -> dict[str, Tensor]:
        """Returns the tensors that this rank saves. If several ranks have the same data, a hash of the tensor's name
        decides which of them saves it. All ranks therefore save about equally many bytes."""
        return {
            name: held.tensor
            for name, held in self.held.items()
            if local(held.tensor).numel() > 0 and zlib.crc32(name.encode()) % held.copies == held.position
        }


def capture(
    model: nn.Module,
    optimizer: Optimizer | None,
    layout: RankLayout,
    *,
    part: Part = "all",
    values: Mapping[str, JsonValue] | None = None,
    rank_values: Mapping[str, JsonValue] | None = None,
) -> CheckpointState:
    """Returns the state of this rank's model and optimizer. The state's tensors share memory with both. Calls no
    collective. Creates the optimizer's moments if they do not exist yet.

    Args:
        model: The model, not wrapped in DDP. With FSDP2, experts are DTensors on a mesh over the ranks with the same
            experts (EDP), and other parameters are DTensors on a mesh over all ranks. FSDP2 shards a stack of experts in
            dim 0 or inside each expert. `capture` reshards parameters that FSDP2 has gathered.
        optimizer: Optimizer of the model's parameters; None for a state without moments.
        part: `trained` omits frozen parameters. `frozen` includes only frozen parameters.
    """
    stacks = _expert_stacks(model)
    tensors = _distinct_tensors(model)
    if part != "all":
        frozen = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and not tensor.requires_grad}
        tensors = {name: tensor for name, tensor in tensors.items() if (name in frozen) == (part == "frozen")}
    held, specs = _logical(tensors, tensors, layout, stacks)
    if optimizer is not None:
        materialise_moments(optimizer)  # before the first step creates zeros, so that every state has all moments
        parameters = {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
        # A parameter without elements on this rank has no moments on this rank, but may have moments on other ranks.
        trained = {name: p for name, p in parameters.items() if p in optimizer.state or is_empty_here(p)}
        for moment, named in _by_moment(model, orthogonal=getattr(optimizer, "orthogonal", False)).items():
            like = {name: p for name, p in trained.items() if name in named}
            known = {name: optimizer.state[p][moment] for name, p in like.items() if p in optimizer.state}
            moments, moment_specs = _logical(like, known, layout, stacks)
            prefix = f"{OPTIMIZER_PREFIX}{moment}."
            held |= {prefix + name: each for name, each in moments.items()}
            specs |= {prefix + name: spec for name, spec in moment_specs.items()}
    return CheckpointState(held, specs, layout, optimizer, values or {}, rank_values or {})


def trained_tensors(
    model: nn.Module, layout: RankLayout, *, gradients: bool = False
) -> tuple[Mapping[str, LocalShard], Sequence[str]]:
    """Returns this rank's part of each trained parameter, or of its gradient, by logical name, and the names of the
    trained parameters of all ranks. The tensors share memory with the model. Calls no collective."""
    parameters = {n: t for n, t in _distinct_tensors(model).items() if isinstance(t, nn.Parameter) and t.requires_grad}
    found = {n: t.grad for n, t in parameters.items() if t.grad is not None} if gradients else parameters
    held, specs = _logical(parameters, found, layout, _expert_stacks(model))
    return held, tuple(specs)


def moment_specs(model: nn.Module, layout: RankLayout, *, orthogonal: bool) -> dict[str, TensorSpec]:
    """Maps the logical name of each optimizer moment to its shape and dtype. Frozen parameters have no moments.
    `orthogonal` is passed to `moments_of`."""
    parameters = {n: t for n, t in _distinct_tensors(model).items() if isinstance(t, nn.Parameter) and t.requires_grad}
    found: dict[str, TensorSpec] = {}
    for moment, named in _by_moment(model, orthogonal=orthogonal).items():
        like = {name: parameter for name, parameter in parameters.items() if name in named}
        specs = _logical(like, {}, layout, _expert_stacks(model))[1]
        found |= {f"{OPTIMIZER_PREFIX}{moment}.{name}": spec for name, spec in specs.items()}
    return found


def _by_moment(model: nn.Module, *, orthogonal: bool) -> dict[str, set[str]]:
    moments = {each.name: moments_of(each, orthogonal=orthogonal) for each in named_parameters(model)}
    return {moment: {name for name, has in moments.items() if moment in has} for moment in MOMENTS}


def _distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by logical name. A tensor with several names (tied weights) has only its
    first name."""
    distinct: dict[int, tuple[str, Tensor]] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{path}: a module's extra state is not saved; make it a buffer or pass it in `values`")
        distinct.setdefault(id(tensor), (logical_name(path), tensor))
    return dict(distinct.values())


def _expert_stacks(model: nn.Module) -> set[str]:
    """Returns the names of parameters that are stacks of experts [e, ...]. A checkpoint has one tensor per expert."""
    return {each.name for each in named_parameters(model) if each.role in EXPERTS}


def _logical(
    like: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    layout: RankLayout,
    stacks: Collection[str],
) -> tuple[dict[str, LocalShard], dict[str, TensorSpec]]:
    """Returns this rank's part of each logical tensor in `tensors`, and the shape and dtype of every whole logical tensor
    in `like`. `tensors` has only the names in `like` whose tensors are on this rank."""
    held: dict[str, LocalShard] = {}
    specs: dict[str, TensorSpec] = {}
    for name, parameter in like.items():
        tensor = tensors.get(name)
        if name not in stacks:
            specs[name] = TensorSpec(tuple(parameter.shape), parameter.dtype)
            if tensor is not None:
                held[name] = _hold(tensor.detach(), layout.world_size, layout.rank)
            continue
        prefix, group_name, tensor_name = name.rsplit(".", 2)
        groups = {group.name: group for group in layout.placement.groups}
        # In families with several banks of experts, the name contains the module around each bank.
        group = groups[group_name if group_name in groups else prefix.rpartition(".")[2]]
        spec = TensorSpec(tuple(parameter.shape[1:]), parameter.dtype)
        names = {e: f"{prefix}.{group_name}.{e - group.first_expert}.{tensor_name}" for e in group.experts}
        specs |= dict.fromkeys(names.values(), spec)
        if tensor is not None:
            held |= {names[expert]: each for expert, each in _unstack(name, tensor.detach(), group, layout)}
    return held, specs


def _unstack(name: str, stack: Tensor, group: ExpertGroup, layout: RankLayout) -> Iterator[tuple[int, LocalShard]]:
    """Yields the global id and the tensor of each expert in this rank's stack [e, ...]. The tensors are views."""
    experts = layout.placement.local_experts(layout.ep_rank, group)
    assert stack.shape[0] == len(experts), f"{name} stacks {stack.shape[0]} experts, the placement says {len(experts)}"
    if not isinstance(stack, DTensor):
        for slot, expert in enumerate(experts):
            yield expert, _hold(stack[slot], layout.edp_size, layout.edp_rank)
        return
    shape, offset = compute_local_shape_and_global_offset(stack.shape, stack.device_mesh, stack.placements)
    local = stack.to_local()
    if Shard(0) in stack.placements:  # each expert is whole on one rank of the mesh
        assert sum(isinstance(p, Shard) for p in stack.placements) == 1, f"{name}: {stack.placements} cuts experts twice"
        copies, position = _replicas(stack)
        for slot in range(shape[0]):
            yield experts[offset[0] + slot], LocalShard(local[slot], copies, position)
        return
    placements = [Shard(p.dim - 1) if isinstance(p, Shard) else Replicate() for p in stack.placements]
    whole = torch.empty(stack.shape[1:], device="meta")
    for slot, expert in enumerate(experts):
        piece = DTensor.from_local(
            local[slot], stack.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        yield expert, LocalShard(piece, *_replicas(piece))


def _hold(tensor: Tensor, copies: int, position: int) -> LocalShard:
    return LocalShard(tensor, *_replicas(tensor)) if isinstance(tensor, DTensor) else LocalShard(tensor, copies, position)


def _replicas(tensor: DTensor) -> tuple[int, int]:
    """Returns the number of ranks with the same shard of `tensor`, and this rank's index among these ranks."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is outside the mesh of a tensor it holds"
    copies, position = 1, 0
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            position = position * tensor.device_mesh.size(axis) + coordinate[axis]
            copies *= tensor.device_mesh.size(axis)
    return copies, position
