"""AdamW (decoupled weight decay, Loshchilov & Hutter 2019) whose moments are stored between steps in fp32 or in bf16.

A moment in bf16 is converted to the parameter's dtype, updated, and rounded to the nearest bf16 value. Rounding is
elementwise and draws no random numbers, so a moment is bit-identical for every layout of ranks. An update that changes the
moment by less than 2^-9 to 2^-8 (0.2 to 0.4 %) is lost in rounding. If a gradient becomes 0, its moment shrinks by the
fraction 1 - beta in each step, so 1 - beta must be above 2^-8. The configuration therefore allows betas up to 0.99, where
the change is 1 %. (Stochastic rounding would allow larger betas, but draws a random number per element by its global
index.)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
WIDE_BYTES = 256 << 20  # largest total size of the moments that are converted at once; a single parameter may exceed it
Moments = Literal["fp32", "bf16"]


class AdamW(torch.optim.AdamW):
    """AdamW for parameter groups from `split_parameters`. The method `step` skips groups with the key "moments", which Muon
    updates. By default a moment has the dtype of its parameter."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        moments: Moments = "fp32",
    ) -> None:
        # torch rejects an empty list of groups, but a rank without parameters must still take part in each step.
        given = list(groups) or [{"params": []}]
        super().__init__(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)  # pyright: ignore
        self.moment_dtype = torch.bfloat16 if moments == "bf16" else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        every = self.param_groups
        mine = [group for group in every if "moments" not in group]
        if self.moment_dtype is None:
            self.param_groups = mine
            try:
                return super().step(closure)
            finally:
                self.param_groups = every
        for group in mine:
            for parameters in _slices([each for each in group["params"] if each.grad is not None]):
                self._update_rounded(group, parameters)
        return None

    def _update_rounded(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            add_moments(self, group, parameter)
        states = [self.state[each] for each in parameters]
        weights = [local(each) for each in parameters]
        kept = [[local(state[moment]) for state in states] for moment in MOMENTS]
        wide = [[each.to(weight.dtype) for each, weight in zip(moment, weights, strict=True)] for moment in kept]
        beta1, beta2 = group["betas"]
        adamw(
            weights,
            [local(each.grad) for each in parameters],
            wide[0],
            wide[1],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for narrow, updated in zip(kept, wide, strict=True):
            torch._foreach_copy_(narrow, updated)  # pyright: ignore[reportPrivateImportUsage]


def _slices(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields lists of parameters. The converted moments of a list have at most WIDE_BYTES, or it has only one parameter."""
    part: list[Tensor] = []
    size = 0
    for parameter in parameters:
        more = len(MOMENTS) * local(parameter).nbytes
        if part and size + more > WIDE_BYTES:
            yield part
            part, size = [], 0
        part.append(parameter)
        size += more
    if part:
        yield part


def local(tensor: Any) -> Tensor:
    """Returns this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_moments(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Creates the moments and the step count of one parameter if they do not exist yet."""
    state, dtype = optimizer.state[parameter], moment_dtype(optimizer) or parameter.dtype
    for moment in group.get("moments", MOMENTS):
        if moment not in state:
            state[moment] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    if "moments" not in group and not counts_by_group(optimizer) and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)


def moment_dtype(optimizer: Optimizer) -> torch.dtype | None:
    """Returns the dtype of all moments; None if each moment has its parameter's dtype."""
    return getattr(optimizer, "moment_dtype", None)


def counts_by_group(optimizer: Optimizer) -> bool:
    """Returns whether the optimizer has one step count per parameter group."""
    # Apex stores one step count per parameter group, torch one step tensor per parameter.
    return not isinstance(optimizer, torch.optim.AdamW)
