"""Makes a single-device model parallel in three steps:

1. Experts: the model is built with only this rank's experts, and its dispatcher gets the EP group.
2. Recompute: building the model sets up recomputation inside each FSDP2 unit, so that FSDP2 gathers before recomputation.
3. FSDP2 or DDP: they wrap the model last, because they need the final parameters and units.

Gradients are summed over ranks, not averaged, because a rank's loss is its part of the global loss. Dense gradients are
summed over the world, and gradients of experts over edp (ranks with the same experts). Router weights stay replicated plain
tensors, because FSDP2 would cast them to its compute dtype. After backward, `reduce_gradients` sums the gradients of
routers over the world.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_dist.comm.collectives import sum_gradients
from moe_dist.comm.names import EXPERT_GRADIENTS, ROUTER_GRADIENTS
from moe_dist.errors import ConfigError
from moe_dist.model.transformer import Transformer
from moe_dist.moe.experts.experts import ExpertStack
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.parameter_names import EXPERTS, ROUTERS, NamedParameter, Role, named_parameters

_NOT_IN_DDP = ROUTERS | EXPERTS  # roles whose gradients DDP leaves to `reduce_gradients`


class ParallelModel:
    """A transformer on a mesh. Call the object itself for a forward of training, and `reduce_gradients` after the last
    backward of a step.

    Attributes:
        model: The unwrapped transformer, for evaluation and state. Under FSDP2 the transformer's parameters are DTensors.
        parameters: All parameters of this rank, with logical names; a stack of experts has a name without an expert index.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        data: Literal["ddp", "fsdp2"],
        *,
        fsdp_gather: Literal["micro_batch", "step"] = "micro_batch",
    ) -> None:
        self.model = model
        self._once = data == "fsdp2" and fsdp_gather == "step"
        self.mesh = mesh
        self.data: Literal["ddp", "fsdp2"] = data
        self.parameters = tuple(named_parameters(model))
        dense = any(each.role not in _NOT_IN_DDP and each.parameter.requires_grad for each in self.parameters)
        self._stacks = [module for module in model.modules() if isinstance(module, ExpertStack)]
        # DDP rejects a model without trainable dense parameters.
        self._module: nn.Module = _wrap_ddp(model, mesh) if data == "ddp" and dense else model
        if data == "fsdp2" and model.args.two_batch_overlap:
            model.register_forward_pre_hook(_gather_all)  # runs after the hook with which FSDP2 begins a forward

    def __call__(self, *args: Any) -> Any:
        return self._module(*args)

    @property
    def reader(self) -> tuple[int, int]:
        """Returns this rank's index among the ranks that read different sequences, and the number of such ranks."""
        return self.mesh.rank, self.mesh.world_size

    @property
    def layer_ranks(self) -> dist.ProcessGroup | None:
        """Returns the group of ranks that have the same layers as this rank."""
        return self.mesh.world

    @property
    def counts_tokens(self) -> bool:
        """Returns whether this rank counts its tokens and losses. False if another rank counts them; here always True."""
        return True

    def replicas(self, named: NamedParameter) -> int:
        """Returns the number of ranks that have the same part of a parameter (1 for a shard). A gradient norm divides the
        squared norm of the parameter's gradient by this number."""
        if isinstance(named.parameter, DTensor):
            return 1
        return self.mesh.edp_size if named.role in EXPERTS else self.mesh.world_size

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Encloses forward and backward of a micro-batch. DDP sums gradients over ranks only in a step's last micro-batch.
        With `fsdp_gather="micro_batch"`, FSDP2 gathers parameters and sums gradients in each micro-batch. With "step", it
        gathers in the first and sums in the last. Experts keep copies of their weights, in the dtype of their inputs, until
        the last micro-batch or an error."""
        for stack in self._stacks:
            stack.keep_copies(True)
        if self._once:
            self._keep_gathered(until_next=not last)
        skip = isinstance(self._module, DistributedDataParallel) and not last
        try:
            with (
                self.mesh.tracker.among(f"forward or backward with {self.data}"),
                self._module.no_sync() if skip else nullcontext(),  # pyright: ignore[reportCallIssue]
            ):
                yield
        except BaseException:
            last = True
            raise
        finally:
            for stack in self._stacks if last else ():
                stack.keep_copies(False)  # because the optimizer or a checkpoint load now changes the weights
            if self._once and last:
                self._root.set_reshard_after_forward(True)  # otherwise evaluation would leave all parameters gathered

    @property
    def _root(self) -> FSDPModule:
        assert isinstance(self.model, FSDPModule)
        return self.model

    def _keep_gathered(self, *, until_next: bool) -> None:
        """Makes FSDP2 keep gathered parameters after forward. With `until_next`, it keeps them also after backward, and
        adds up this rank's gradients in fp32 instead of reducing them over ranks."""
        self._root.set_reshard_after_forward(False)
        self._root.set_reshard_after_backward(not until_next)
        self._root.set_requires_gradient_sync(not until_next)

    def reduce_gradients(self) -> None:
        """Sums gradients that the wrapper does not sum: of routers over the world and, under DDP, of experts over edp."""
        routers = [info.parameter for info in self.parameters if info.role in ROUTERS and info.parameter.requires_grad]
        sum_gradients(routers, self.mesh.world, flat=True, name=ROUTER_GRADIENTS, tracker=self.mesh.tracker)
        if self.data == "ddp" and self.mesh.edp_size > 1:
            experts = [info.parameter for info in self.parameters if info.role in EXPERTS]
            experts = [parameter for parameter in experts if parameter.numel() and parameter.requires_grad]
            sum_gradients(experts, self.mesh.edp, flat=False, name=EXPERT_GRADIENTS, tracker=self.mesh.tracker)

    def clear_gradients(self) -> None:
        """Sets the gradients in DDP's buckets to zero, and all other gradients to None. This includes parameters that the
        optimizer lacks (frozen, or empty on this rank)."""
        in_buckets = []
        for each in self.parameters:
            gradient = each.parameter.grad
            if gradient is None:
                continue
            if isinstance(self._module, DistributedDataParallel) and each.role not in _NOT_IN_DDP:
                # The gradient stays a view of the bucket. Otherwise the next step would accumulate gradients in a new
                # tensor, as the first step does, and then copy the sum into the bucket.
                in_buckets.append(gradient)
            else:
                each.parameter.grad = None
        if in_buckets:
            torch._foreach_zero_(in_buckets)  # pyright: ignore[reportPrivateImportUsage]


def freeze_all_but(model: nn.Module, roles: Collection[Role]) -> None:
    """Freezes all parameters whose role is not in `roles`. Frozen parameters get no gradients and no moments. Call this
    function before FSDP2 or DDP wraps the model, so that the wrapper skips frozen parameters."""
    for each in named_parameters(model):
        each.parameter.requires_grad_(each.role in roles)


def shard(model: Transformer, mesh: Mesh, precision: torch.dtype) -> None:
    """Applies FSDP2 to the model in place. Its units are each layer's attention, each MoE layer or FFN, and the model
    itself with all remaining parameters.

    An MoE layer is one unit, whose experts are sharded over edp and whose other parameters are sharded over the world.
    FSDP2 thus runs no collective between the layer's two exchanges (dispatch and combine). If the experts were a separate
    unit, its reduce-scatter would run between the exchanges of backward, where ranks can deadlock. With edp = 1 this rank's
    experts are on no other rank. They then stay plain tensors, because FSDP2 would needlessly copy them and their gradients
    in each micro-batch. Raises ConfigError: see `_expert_placement`."""
    # cast_forward_inputs=False, because routing weights and loss are fp32 and must not be rounded at a unit's boundary
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if precision not in (torch.bfloat16, torch.float16):
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    plain = ROUTERS if mesh.edp_size > 1 else _NOT_IN_DDP
    ignored = {each.parameter for each in named_parameters(model) if each.role in plain}
    options: dict[str, Any] = {"mesh": mesh.world_mesh, "mp_policy": policy, "ignored_params": ignored}
    # Units return views, which FSDP2 warns about on each rank; no code changes a unit's output in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for unit in model.units():
        fully_shard(unit, shard_placement_fn=_expert_placement(unit, mesh), **options)
    fully_shard(model, **options)  # wrapped last, because the model's unit gets all parameters that no other unit has
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # FSDP2 then sums gradients instead of averaging them
            module.set_force_sum_reduction_for_comms(True)  # because gloo has no pre-multiplied sum


def _gather_all(model: nn.Module, _inputs: Any) -> None:
    """Gathers the parameters of all units before the first layer, if the layers run alternately on two halves of a
    micro-batch. The units' own hooks then do not run. FSDP2 reduces gradients at the end of backward, so no collective runs
    between exchanges."""
    assert isinstance(model, Transformer)
    for unit in model.modules() if model.in_halves else ():
        if isinstance(unit, FSDPModule):
            unit.unshard()


def _expert_placement(moe: nn.Module, mesh: Mesh) -> Any:
    """Returns the function that tells FSDP2 how to shard expert stacks over edp. It shards by expert, or by the rows of
    each expert if the edp size divides only the number of rows. Returns None if no expert must be sharded. Raises
    ConfigError if the installed torch cannot shard the parameters of one unit over different ranks."""
    experts = {each.parameter for each in named_parameters(moe) if each.role in EXPERTS}
    if not experts or mesh.edp_size == 1:
        return None
    try:  # imported here, so that this file works with an older torch
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError as error:
        raise ConfigError(
            f"parallel.data=fsdp2, parallel.edp={mesh.edp_size}: torch {torch.__version__} cannot shard experts over fewer "
            "ranks than the other parameters of their layer, which came with torch 2.12; install torch>=2.12, or set "
            "parallel.edp=1 with a larger parallel.ep, or parallel.data=ddp (docs/parallelism.md)"
        ) from error
    info = FSDPMeshInfo(mesh=mesh.edp_mesh, shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> ShardPlacementResult | None:
        if parameter not in experts:
            return None
        by_rows = parameter.shape[0] % mesh.edp_size and parameter.shape[1] % mesh.edp_size == 0
        return ShardPlacementResult(Shard(1 if by_rows else 0), info)

    return place


class _OrderedBuckets(DistributedDataParallel):
    """DDP whose buckets have the order in which gradients become ready: from the last parameter to the first.

    Plain DDP reorders its buckets after the first backward. In a ring of three or more ranks, an element's position in its
    bucket determines the order in which ranks' values are added. With plain DDP the first step after a resume would
    therefore differ in the last bits from the same step of an uninterrupted run.
    """

    def _build_params_for_reducer(self) -> Any:
        parameters, sparse = super()._build_params_for_reducer()  # pyright: ignore
        return parameters[::-1], sparse[::-1]


def _wrap_ddp(model: Transformer, mesh: Mesh) -> DistributedDataParallel:
    """Wraps the model in DDP, which sums (not averages) the gradients of dense parameters. Buffers are not broadcast,
    because all ranks compute the same values."""
    ignored = [each.path for each in named_parameters(model) if each.role in _NOT_IN_DDP]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = _OrderedBuckets(model, process_group=mesh.world, init_sync=False, gradient_as_bucket_view=True)
    wrapped.reducer._push_all_rebuilt_params()
    wrapped.reducer._rebuild_buckets()  # rebuilt now, so that the first step has the same buckets as all later steps
    wrapped.register_comm_hook(mesh.world, _sum_hook)  # replaces DDP's average
    return wrapped


def _sum_hook(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    if work is None:
        raise AssertionError("the process group returned no work for an asynchronous all-reduce")
    return work.get_future().then(lambda future: future.value()[0])
