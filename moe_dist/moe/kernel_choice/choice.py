"""Chooses between Triton kernels and operations of torch for the arithmetic on rows."""

import importlib.util
import os
from typing import Literal

import torch

from moe_dist.moe.kernel_choice import trial
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH

KernelKind = Literal["auto", "torch", "triton"]


def choose_kernels(kind: KernelKind, *, device: torch.device, dtype: torch.dtype) -> tuple[RowKernels, str | None]:
    """Returns the kernels, and for `auto` on CUDA the reason if the kernels are torch's. `auto` first tests Triton's
    kernels (module `trial`).

    Raises:
        ValueError: kind is `triton`, and `why_not_triton` returns a reason.
    """
    if kind == "torch" or (kind == "auto" and device.type != "cuda"):
        return TORCH, None
    reason = why_not_triton(device, dtype)
    if reason is None:
        from moe_dist.moe.kernels.triton_kernels import TRITON  # imports Triton, which a CPU may lack

        reason = trial.why_not(TRITON, device, dtype) if kind == "auto" else None
        if reason is None:
            return TRITON, None
    if kind == "triton":
        raise ValueError(f"parallel.kernels.kind=triton: {reason}; take auto or torch (docs/gpu.md)")
    return TORCH, reason


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why the Triton kernels cannot be used, else None. On a CPU Triton's interpreter can run the Triton
    kernels."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype == torch.float64:
        return "the kernels sum in fp32, which is not enough for a float64 model"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"the kernels are for compute capability 8.0 and up, and this GPU has {'.'.join(map(str, capability))}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels need CUDA, and this rank computes on {device.type}"
    return None
