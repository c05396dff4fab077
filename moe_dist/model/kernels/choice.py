"""Makes the dense parts of a transformer use Triton kernels after a trial on this machine (see `moe/kernel_choice.py`)."""

from functools import partial

import torch
from torch import Tensor

from moe_dist.model.attention import CausalAttention
from moe_dist.model.kernels.interface import TORCH, DenseKernels
from moe_dist.model.layers import RMSNorm, rotary_table
from moe_dist.model.transformer import Transformer
from moe_dist.moe import kernel_choice
from moe_dist.moe.kernel_choice import Results, random
from moe_dist.moe.layer import MoELayer

HEADS, LENGTH, WIDTH, WORDS = 3, 40, 72, 5000  # WORDS is so large that a kernel needs several blocks


def use(model: Transformer, kernels: DenseKernels) -> None:
    """Makes the norms, the attention and the loss of the model use the functions in `kernels`."""
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


def triton_kernels() -> DenseKernels:
    """Imports Triton, which a machine without a GPU may lack."""
    from moe_dist.model.kernels.triton_kernels import TRITON

    return TRITON


def why_not(kernels: DenseKernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None if the kernels' results equal torch's, else a text about the difference or failure. Compiles kernels."""
    return kernel_choice.why_differ(lambda: _results(kernels, dtype), lambda: _results(TORCH, dtype), device)


def _results(kernels: DenseKernels, dtype: torch.dtype) -> Results:
    x_BHSd = random(20, 2, HEADS, LENGTH, WIDTH).to(dtype).requires_grad_()
    table = rotary_table(torch.arange(2 * LENGTH).view(2, LENGTH), WIDTH - 8, 1e4)  # 8 values of a head are not rotated
    turned = [kernels.rotate(x_BHSd, table), kernels.rotate(x_BHSd, table, "adjacent")]
    torch.stack([each.float().square().sum() for each in turned]).dot(torch.tensor([1.0, 2.0])).backward()
    logits_BSV = (4 * random(21, 2, 7, WORDS)).to(dtype).requires_grad_()
    labels_BS = torch.arange(14).view(2, 7) * 350 - 1
    losses_BS = kernels.token_losses(logits_BSV, labels_BS.where(labels_BS >= 0, -100))
    (losses_BS * (labels_BS + 2)).sum().backward()
    wide_MD, weight_D = random(22, 5, WORDS).to(dtype).requires_grad_(), random(23, WORDS).requires_grad_()
    normed_MD = kernels.rms_norm(wide_MD, weight_D, 1e-5)
    for_experts_MD, for_router_MD = kernels.norm_for_router(wide_MD, weight_D, 1e-5)
    (normed_MD.float() + 2 * for_experts_MD + 3 * for_router_MD).square().sum().backward()
    assert wide_MD.grad is not None
    assert weight_D.grad is not None
    assert x_BHSd.grad is not None
    assert logits_BSV.grad is not None
    named = {"rotated halves": turned[0], "rotated neighbours": turned[1], "gradient of rotation": x_BHSd.grad}
    named |= {"losses of tokens": losses_BS, "gradient of logits": logits_BSV.grad}
    named |= _normed_and_rotated(kernels, dtype) | {
        "norm": normed_MD,
        "norm for the router": for_router_MD,
        "gradient of the norm": wide_MD.grad,
        "gradient of its weight": weight_D.grad,
    }
    return [(name, each.detach()) for name, each in named.items()]


def _normed_and_rotated(kernels: DenseKernels, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns rotated queries that are normed over all heads together or over each head, and their gradients."""
    table, found = rotary_table(torch.arange(2 * LENGTH).view(2, LENGTH), WIDTH, 1e4), {}
    for words, width in (("all heads", HEADS * WIDTH), ("each head", WIDTH)):
        x_BSHd, weight = random(24, 2, LENGTH, HEADS, WIDTH).to(dtype).requires_grad_(), random(25, width).requires_grad_()
        turned = kernels.norm_and_rotate(x_BSHd, weight, 1e-5, table, "halves")
        if turned is None:
            normed = kernels.rms_norm(x_BSHd.flatten(-2).unflatten(-1, (-1, width)), weight, 1e-5)
            turned = kernels.rotate(normed.view(x_BSHd.shape).transpose(1, 2), table)
        turned.float().pow(3).sum().backward()
        assert x_BSHd.grad is not None
        assert weight.grad is not None
        found |= {f"norm of {words}, rotated": turned, f"gradient of {words}": x_BSHd.grad}
        found[f"gradient of the weight of {words}"] = weight.grad
    return found
