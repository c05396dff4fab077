"""Triton kernels for the cross entropy of each token, and for the gradient of its logits. Arithmetic is fp32, but no fp32
copy of the logits is written.

    loss = log z - x[label],   log z = log sum over V of exp(x)
    dx = dloss (exp(x - log z) - [v = label])

If a label is negative, the token's loss and gradients are 0. If a label is V or more, they are NaN. Shape letters: T
tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_dist.moe.kernels.operation import launch, operation

BLOCK = 4096  # number of words that one program has in registers at once: 32 per thread


@triton.jit
def cross_entropy_kernel(logits, label_T, loss, log_z, V: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    most = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(logits + t * V + word, mask=word < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x, 0))
        base = tl.maximum(larger, -3e38)  # finite if all logits so far are -inf
        total = total * tl.exp(most - base) + tl.sum(tl.exp(x - base), 0)
        most = larger
    label = tl.load(label_T + t)
    chosen = tl.load(logits + t * V + tl.minimum(tl.maximum(label, 0), V - 1)).to(tl.float32)
    chosen = tl.where(label < V, chosen, float("nan"))
    tl.store(log_z + t, most + tl.log(total))
    tl.store(loss + t, tl.where(label < 0, 0.0, tl.log(total) + (most - chosen)))  # exact for large logits, too


@triton.jit
def cross_entropy_backward_kernel(logits, label_T, log_z, grad, out, V: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + t * V + word, mask=word < V).to(tl.float32)
    label = tl.load(label_T + t)
    error = tl.exp(x - tl.load(log_z + t)) - tl.where(word == label, 1.0, 0.0)
    error = tl.where(label < V, error, float("nan"))
    error = tl.where(label < 0, 0.0, error * tl.load(grad + t))
    tl.store(out + t * V + word, error.to(out.dtype.element_ty), mask=word < V)


@operation("cross_entropy(Tensor logits, Tensor label) -> (Tensor, Tensor)")
def cross_entropy(logits: Tensor, label: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns the losses and log z, both fp32 [...], for logits [..., V] and int64 labels [...]."""
    loss, log_z = (torch.empty_like(label, dtype=torch.float32) for _ in range(2))
    yield loss, log_z
    words = logits.shape[-1]
    launch(cross_entropy_kernel, (label.numel(),), logits, label, loss, log_z, V=words, BLOCK=_block(words))


@operation("cross_entropy_backward(Tensor logits, Tensor label, Tensor log_z, Tensor grad) -> Tensor")
def cross_entropy_backward(logits: Tensor, label: Tensor, log_z: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Returns the gradient of the logits, in the logits' dtype. `grad` [...] has the gradients of the losses."""
    out, words = torch.empty_like(logits), logits.shape[-1]
    yield out
    grid = (label.numel(), triton.cdiv(words, _block(words)))
    launch(cross_entropy_backward_kernel, grid, logits, label, log_z, grad, out, V=words, BLOCK=_block(words))


def _block(words: int) -> int:
    return min(BLOCK, triton.next_power_of_2(words))
