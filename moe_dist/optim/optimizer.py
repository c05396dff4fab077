"""Makes parameter groups and the optimizer AdamW (from torch or NVIDIA Apex), sets an optimizer's state, and computes the
global gradient norm and learning-rate schedules.

This file issues no collective: the training step sums each rank's part of the squared gradient norm. The arguments of a
schedule have the names of the configuration's fields, so that the caller can pass a section's `model_dump()`.
"""

import importlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_dist.comm.collectives import from_host
from moe_dist.errors import ConfigError
from moe_dist.placement.parameter_names import EXPERTS, OUTPUT_NAMES, ROUTERS, NamedParameter, Role, named_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
MATRIX_MOMENTS = MOMENTS[:1]  # the moment of a matrix if the optimizer orthogonalises updates
NO_DECAY = ROUTERS | {Role.EMBEDDING, Role.ZERO_COMPUTATION}  # roles without weight decay; vectors have none either


def local(tensor: Any) -> Tensor:
    """Returns this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_empty_here(parameter: nn.Parameter) -> bool:
    """Returns whether this rank has no element of the parameter: no expert of the group, or an empty shard."""
    return local(parameter).numel() == 0


def moments_of(named: NamedParameter, *, orthogonal: bool) -> tuple[str, ...]:
    """Returns the names of a parameter's moments. If `orthogonal`, the matrices of attention, FFNs and experts have one
    moment, which gives an orthogonalised update. Embedding, output, routers, adapters and vectors have two moments."""
    shape = named.parameter.shape
    stacked = named.role is Role.EXPERT and len(shape) == 3
    dense = named.role is Role.DENSE and named.name not in OUTPUT_NAMES and len(shape) == 2 and min(shape) > 1
    return MATRIX_MOMENTS if orthogonal and (stacked or dense) else MOMENTS


def split_parameters(model: nn.Module, *, weight_decay: float, orthogonal: bool = False) -> list[dict[str, Any]]:
    """Returns parameter groups {"params", "weight_decay"} for a torch optimizer, in a fixed order. Groups whose parameters
    have only MATRIX_MOMENTS (see `moments_of`) also have the key "moments".

    A fused optimizer kernel needs tensors of one type. Therefore plain tensors, DTensors over all ranks (dense parameters)
    and DTensors over the edp ranks (experts) are in different parameter groups. Frozen parameters and parameters that are
    empty on this rank are left out. An empty shard of a matrix with MATRIX_MOMENTS is kept, because all ranks that share
    the matrix must take part in its all-gather.
    """
    groups: dict[tuple[bool, object, object], dict[str, Any]] = {}
    for named in named_parameters(model):
        parameter, moments = named.parameter, moments_of(named, orthogonal=orthogonal)
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        gathered = moments != MOMENTS and mesh is not None
        if not parameter.requires_grad or (is_empty_here(parameter) and not gathered):
            continue
        decay = parameter.ndim >= (3 if named.role in EXPERTS else 2) and named.role not in NO_DECAY
        more = {} if moments == MOMENTS else {"moments": moments}
        group = {"params": [], "weight_decay": weight_decay if decay else 0.0, **more}
        group = groups.setdefault((decay, moments, mesh), group)
        group["params"].append(parameter)
    return list(groups.values())


class OptimizerContext(NamedTuple):
    """The values that make an optimizer together with its configuration section: the parameter groups from
    `split_parameters`, and the dtype of the computation."""

    groups: Sequence[dict[str, Any]]
    dtype: torch.dtype


def adamw(context: OptimizerContext, **fields: Any) -> Optimizer:
    """Makes the optimizer for `optimizer.kind=adamw`."""
    return make_optimizer(context.groups, **fields)


def make_optimizer(
    groups: Sequence[dict[str, Any]],
    *,
    backend: Literal["auto", "torch", "apex"],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Makes torch's AdamW, or NVIDIA Apex's if installed, for groups from `split_parameters`. `weight_decay` applies to
    groups without the key "weight_decay". Raises ConfigError if backend=apex, but Apex is missing or does not support the
    parameters."""
    apex_adam = _apex_fused_adam() if backend != "torch" else None
    parameters = [parameter for group in groups for parameter in group["params"]]
    obstacle = _apex_obstacle(apex_adam, parameters)  # the reason why Apex cannot be used, or None
    if backend == "apex" and obstacle:
        raise ConfigError(f"optimizer.backend=apex: {obstacle}")
    if apex_adam is not None and not obstacle:
        return apex_adam(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)
    # torch rejects an empty list of groups, but a rank without parameters must still take part in each step.
    return torch.optim.AdamW(groups or [{"params": []}], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def _apex_fused_adam() -> Callable[..., Optimizer] | None:
    # FusedAdam shows that the package is NVIDIA Apex: the package `apex` on the Python index is another project.
    try:
        return getattr(importlib.import_module("apex.optimizers"), "FusedAdam", None)
    except ImportError:
        return None


def _apex_obstacle(apex_adam: Callable[..., Optimizer] | None, parameters: Sequence[torch.Tensor]) -> str | None:
    if apex_adam is None:
        return (
            "NVIDIA Apex is not installed (no apex.optimizers.FusedAdam; the package `apex` on the Python index is another "
            "project); build it from NVIDIA's repository, or set optimizer.backend=torch"
        )
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        return "its kernels do not support FSDP2's sharded parameters; set parallel.data=ddp or optimizer.backend=torch"
    if any(parameter.device.type != "cuda" for parameter in parameters):
        return "its kernels need parameters on CUDA; set parallel.device=cuda or optimizer.backend=torch"
    return None


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def add_moments(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Creates the moments and the step count of one parameter if they do not exist yet."""
    state = optimizer.state[parameter]
    for moment in group.get("moments", MOMENTS):
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    if "moments" not in group and not counts_by_group(optimizer) and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def counts_by_group(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer has one step count per parameter group."""
    # Apex stores one step count per parameter group, torch one step tensor per parameter.
    return not isinstance(optimizer, torch.optim.AdamW)


@torch.no_grad()
def materialise_moments(optimizer: Optimizer) -> None:
    """Creates all moments and step counts as 0, so that a checkpoint can save or load them before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            add_moments(optimizer, group, parameter)


def step_count(optimizer: Optimizer) -> int:
    """Returns the number of steps that the optimizer has taken. Costs one host sync on CUDA."""
    if counts_by_group(optimizer):
        counts = {int(group.get("step", 0)) for group in optimizer.param_groups}
    else:
        steps = [state["step"] for state in optimizer.state.values() if "step" in state]
        counts = set(torch.stack(steps).long().tolist()) if steps else {0}  # one sync for all parameters
    assert len(counts) == 1, f"parameters have taken different numbers of steps: {sorted(counts)}"
    return counts.pop()


def set_step_count(optimizer: Optimizer, count: int) -> None:
    """Sets the number of steps that the optimizer has taken, which determines the bias correction of the moments."""
    if counts_by_group(optimizer):
        for group in optimizer.param_groups:
            group["step"] = count
    else:
        for state in optimizer.state.values():
            if "step" in state:  # an orthogonalised matrix has no bias correction
                state["step"].fill_(count)  # in place, because the fused kernel reads this tensor


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each gradient as a plain tensor, without a copy. Skips parameters without a gradient."""
    gradients = (parameter.grad for parameter in parameters)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]


@torch.no_grad()
def local_norm_squared(parameters: Iterable[tuple[Tensor, int]], *, device: torch.device) -> Tensor:
    """Returns this rank's part of the squared norm of the whole gradient: the sum of ||local part||^2 / replicas over its
    gradients, 0-d float64. The parts of all ranks add up to the squared norm. Costs no host sync.

    Args:
        parameters: Each parameter with its number of replicas, the number of ranks that have the same part of its (already
            reduced) gradient: the world size for a replicated dense parameter, edp for a replicated expert, 1 for a shard.
        device: Device of the result, even if this rank has no gradient.
    """
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[int]]] = defaultdict(lambda: ([], []))
    for parameter, replicas in parameters:
        for gradient in local_gradients((parameter,)):
            gradients, copies = by_dtype[gradient.dtype]
            gradients.append(gradient)
            copies.append(replicas)
    total = torch.zeros((), dtype=torch.float64, device=device)  # created on the device: a copy would sync the host
    for dtype, (gradients, copies) in by_dtype.items():
        norms = torch._foreach_norm(gradients, 2, torch.promote_types(dtype, torch.float32))  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack(list(norms)).double().square().to(device)  # the square can overflow fp32
        total += (squares / from_host(copies, torch.float64, device)).sum()
    return total


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies each gradient in place by the 0-d tensor `factor`, which must be equal on all ranks. Does not sync."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in local_gradients(parameters):
        by_dtype[gradient.dtype].append(gradient)
    for dtype, gradients in by_dtype.items():
        torch._foreach_mul_(gradients, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]


def clip_by_norm(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients by min(1, max_norm / norm). `norm` is the global norm (0-d), which is equal on all ranks."""
    scale_gradients(parameters, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))


def lr_factor(
    step: int,
    *,
    total_steps: int,
    kind: Literal["constant", "cosine", "wsd"],
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_steps: int = 0,
) -> float:
    """Returns the ratio of the learning rate to its peak in optimizer step `step` (0-based) of `total_steps`.

    The warm-up is linear, from 1 / warmup_steps in the first step to 1 in the last warm-up step. After the warm-up,
    `cosine` decreases the ratio along half a cosine. `wsd` keeps the ratio at 1, then decreases it linearly over the last
    `decay_steps` steps. `cosine` and `wsd` reach `min_ratio` in the last step and keep it afterwards. If warm-up and decay
    overlap, the smaller of the two ratios counts.
    """
    done = min(step + 1, total_steps)  # step + 1, so that the first step already has a rate above 0
    rise = min(1.0, done / warmup_steps) if warmup_steps else 1.0
    if kind == "constant":
        return rise
    if kind == "cosine":
        progress = max(0, done - warmup_steps) / max(1, total_steps - warmup_steps)
        return min(rise, min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if kind == "wsd":
        progress = max(0, done - (total_steps - decay_steps)) / max(1, decay_steps)
        return min(rise, 1.0 - (1.0 - min_ratio) * progress)
    raise ValueError(f"schedule kind={kind!r} must be constant, cosine or wsd")


def lr_at(step: int, *, peak: float, **schedule: Any) -> float:
    """Returns the learning rate in optimizer step `step` (0-based). `schedule` is passed to `lr_factor`."""
    return peak * lr_factor(step, **schedule)


def coefficient_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """Returns the value at `step` of a piecewise constant schedule: sorted pairs (first step, value), from step 0 on."""
    return next(value for first, value in reversed(schedule) if first <= step)
