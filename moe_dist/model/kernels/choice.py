"""Lets the dense parts of a transformer use Triton kernels."""

import logging
from functools import partial

import torch
from torch import Tensor

from moe_dist.model.attention import CausalAttention
from moe_dist.model.kernels import trial
from moe_dist.model.kernels.interface import DenseKernels
from moe_dist.model.layers import RMSNorm
from moe_dist.model.transformer import Transformer
from moe_dist.moe.kernel_choice.choice import KernelKind
from moe_dist.moe.layer import MoELayer

logger = logging.getLogger(__name__)


def use(model: Transformer, kernels: DenseKernels) -> None:
    """Lets the norms, the attention and the loss of the model use the functions in `kernels`."""
    model.token_losses = kernels.token_losses  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if isinstance(module, CausalAttention):
            module.rotate, module.project = kernels.rotate, kernels.project  # pyright: ignore
            module.norm_and_rotate = kernels.norm_and_rotate  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(module, MoELayer) and isinstance(module.norm, RMSNorm):
            module.normed = partial(_normed, module.norm, kernels)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(module, RMSNorm):
            module.function = kernels.rms_norm  # pyright: ignore[reportAttributeAccessIssue]


def _normed(norm: RMSNorm, kernels: DenseKernels, x: Tensor) -> tuple[Tensor, Tensor]:
    return kernels.norm_for_router(x, norm.weight, norm.eps)


def use_triton(model: Transformer, kind: KernelKind, *, device: torch.device, dtype: torch.dtype) -> None:
    """Lets the model use Triton's kernels. Call `use_triton` only if the experts use Triton's kernels, too. With `auto` the
    kernels are tried first, and the log has the reason if they are not used."""
    from moe_dist.model.kernels.triton_kernels import TRITON  # imports Triton, which a CPU need not have

    reason = trial.why_not(TRITON, device, dtype) if kind == "auto" else None
    if reason is None:
        use(model, TRITON)
    else:
        logger.warning("parallel.kernels.kind=auto takes torch for norms, attention and loss: %s (docs/gpu.md)", reason)
