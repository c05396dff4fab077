"""The pieces of one global gradient norm. No collective in here: the trainer sums the ranks' contributions."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each gradient there is, as plain tensors that share the gradient's memory."""
    gradients = (parameter.grad for parameter in parameters)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients if g is not None]


@torch.no_grad()
def local_norm_squared(parameters: Iterable[tuple[Tensor, int]], *, device: torch.device) -> Tensor:
    """This rank's contribution to the squared norm of the whole gradient; the sum over all ranks is that norm.

    Args:
        parameters: Pairs of a parameter and the number of ranks that hold the same piece of its (already reduced) gradient:
            all ranks for a replicated dense parameter, edp for a replicated expert, 1 for a shard.
        device: Where the result lies, also on a rank without any gradient.

    Returns:
        0-d float64: sum over the gradients of ||local part||^2 / replicas. Each norm is taken in fp32, or in float64 for
        float64 gradients, then squared and summed in float64. No host sync.
    """
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[int]]] = defaultdict(lambda: ([], []))
    for parameter, replicas in parameters:
        for gradient in local_gradients((parameter,)):
            gradients, copies = by_dtype[gradient.dtype]
            gradients.append(gradient)
            copies.append(replicas)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for dtype, (gradients, copies) in by_dtype.items():
        norms = torch._foreach_norm(gradients, 2, torch.promote_types(dtype, torch.float32))  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack(list(norms)).double().square().to(device)
        total += (squares / torch.tensor(copies, dtype=torch.float64, device=device)).sum()
    return total


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: Tensor) -> None:
    """Multiplies each gradient in place by the 0-d tensor `factor`, which must be the same on all ranks. No host sync."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in local_gradients(parameters):
        by_dtype[gradient.dtype].append(gradient)
    for dtype, gradients in by_dtype.items():
        torch._foreach_mul_(gradients, factor.to(dtype))  # pyright: ignore[reportPrivateImportUsage]


def clip_by_norm(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales the gradients by min(1, max_norm / norm); `norm` is the global norm (0-d), known to all ranks."""
    scale_gradients(parameters, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0))
