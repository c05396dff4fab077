"""Makes a single-device model parallel, in one order:

1. experts: the model was built with this rank's experts only, and its dispatcher holds the EP group;
2. recompute: set inside each unit at construction, so that a wrapper put outside unshards before the recomputation runs;
3. FSDP2 or DDP, last, since both must see the final parameters and the final units.

Nothing is averaged. A rank's loss is its share of the global loss, and every gradient is SUMmed over the ranks that hold
the parameter: dense ones over the world, experts over edp. Router weights stay plain and replicated under both (FSDP2 would
cast them to its compute dtype) and are summed over the world after backward; they are small.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_dist.comm.collectives import sum_gradients, sum_small_gradients
from moe_dist.comm.names import EXPERT_GRADIENTS, ROUTER_GRADIENTS
from moe_dist.model.transformer import Layer, Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.roles import ROUTERS, Role, named_parameters

_NOT_IN_DDP = ROUTERS | {Role.EXPERT}  # DDP leaves their gradients to `reduce_gradients`


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of this rank.

    Attributes:
        name: Logical name; of a stack of experts without their indices.
        replicas: Ranks that hold these very values; 1 for a shard. The global norm divides by it.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    replicas: int


class ParallelModel:
    """A transformer on a mesh: call it for a training forward, then `reduce_gradients` after the last backward.

    Attributes:
        model: The transformer itself, for evaluation and state; under FSDP2 its parameters are DTensors.
        parameters: Every parameter of this rank with its role and replicas.
    """

    def __init__(self, model: Transformer, mesh: Mesh, data: Literal["ddp", "fsdp2"]) -> None:
        self.model = model
        self.mesh = mesh
        self.data: Literal["ddp", "fsdp2"] = data
        named = list(named_parameters(model))
        dense = any(each.role not in _NOT_IN_DDP and each.parameter.requires_grad for each in named)
        # DDP refuses a model without a parameter for it: one whose dense parameters are all frozen.
        self._module: nn.Module = _wrap_ddp(model, mesh) if data == "ddp" and dense else model
        self.parameters = tuple(
            ParameterInfo(each.name, each.parameter, each.role, _replicas(each.role, each.parameter, mesh))
            for each in named
        )

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. DDP reduces in the last one only; FSDP2 in each, into shards."""
        skip = isinstance(self._module, DistributedDataParallel) and not last
        with (
            self.mesh.tracker.among(f"forward or backward with {self.data}"),
            self._module.no_sync() if skip else nullcontext(),  # pyright: ignore[reportCallIssue]
        ):
            yield

    def reduce_gradients(self) -> None:
        """Sums what neither DDP nor FSDP2 reduced: routers over the world and, under DDP, experts over edp."""
        routers = [info.parameter for info in self.parameters if info.role in ROUTERS and info.parameter.requires_grad]
        sum_small_gradients(routers, self.mesh.world, name=ROUTER_GRADIENTS, tracker=self.mesh.tracker)
        if self.data == "ddp" and self.mesh.edp_size > 1:
            experts = [info.parameter for info in self.parameters if info.role is Role.EXPERT]
            experts = [parameter for parameter in experts if parameter.numel() and parameter.requires_grad]
            sum_gradients(experts, self.mesh.edp, name=EXPERT_GRADIENTS, tracker=self.mesh.tracker)


def freeze_all_but(model: nn.Module, roles: Collection[Role]) -> None:
    """Freezes the parameters of all other roles: they get neither gradients nor moments. Call it before sharding and
    wrapping, which leave frozen parameters out."""
    for each in named_parameters(model):
        each.parameter.requires_grad_(each.role in roles)


def shard(model: Transformer, mesh: Mesh, precision: torch.dtype) -> None:
    """Applies FSDP2 in place: attention, MoE layer (or FFN), then the root with embedding, norm and output.

    The MoE layer is one unit whose expert parameters are sharded over edp and whose other parameters over the world, so
    that no gather or reduce falls between its two exchanges; a nested unit for the experts would put its reduce-scatter
    between them in backward, where ranks can deadlock. `cast_forward_inputs=False`: activations already have the compute
    dtype, and the loss's fp32 and the routing weights must not be rounded at a border.
    """
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if precision not in (torch.bfloat16, torch.float16):
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    routers = {each.parameter for each in named_parameters(model) if each.role in ROUTERS}
    options: dict[str, Any] = {"mesh": mesh.world_mesh, "mp_policy": policy, "ignored_params": routers}
    for layer in model.layers:
        if not isinstance(layer, Layer):
            raise AssertionError("model.layers must hold Layer modules")
        fully_shard(layer.attention, **options)
        if layer.has_experts:
            fully_shard(layer.moe, shard_placement_fn=_expert_placement(layer.moe, mesh), **options)
        else:
            fully_shard(layer.ffn, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _expert_placement(moe: nn.Module, mesh: Mesh) -> Any:
    """Expert stacks over edp: by whole experts where they divide evenly, else by rows of each expert."""
    experts = {each.parameter for each in named_parameters(moe) if each.role is Role.EXPERT}
    info = FSDPMeshInfo(mesh=mesh.edp_mesh, shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> ShardPlacementResult | None:
        if parameter not in experts:
            return None
        by_rows = parameter.shape[0] % mesh.edp_size and parameter.shape[1] % mesh.edp_size == 0
        return ShardPlacementResult(Shard(1 if by_rows else 0), info)

    return place


class _OrderedBuckets(DistributedDataParallel):
    """DDP whose buckets hold the parameters from the last to the first, about as their gradients come, from the first step.

    Left alone it orders its buckets anew after the first backward. Where an element lies in its bucket decides in which
    order a ring of three or more ranks adds it up, so the first step after a resume would differ in its last bits from the
    same step of the undisturbed run.
    """

    def _build_params_for_reducer(self) -> Any:
        parameters, sparse = super()._build_params_for_reducer()  # pyright: ignore
        return parameters[::-1], sparse[::-1]


def _wrap_ddp(model: Transformer, mesh: Mesh) -> DistributedDataParallel:
    """DDP over the dense parameters alone, summing instead of averaging. Buffers are constants: nothing to broadcast."""
    ignored = [each.path for each in named_parameters(model) if each.role in _NOT_IN_DDP]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = _OrderedBuckets(model, process_group=mesh.world, init_sync=False, gradient_as_bucket_view=True)
    wrapped.reducer._push_all_rebuilt_params()
    wrapped.reducer._rebuild_buckets()
    wrapped.register_comm_hook(mesh.world, _sum_hook)
    return wrapped


def _sum_hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    if work is None:
        raise AssertionError("the process group returned no work for an asynchronous all-reduce")
    return work.get_future().then(lambda future: future.value()[0])


def _replicas(role: Role, parameter: nn.Parameter, mesh: Mesh) -> int:
    if isinstance(parameter, DTensor):
        return 1
    return mesh.edp_size if role is Role.EXPERT else mesh.world_size
