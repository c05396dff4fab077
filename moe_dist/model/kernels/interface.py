"""The interface of the kernels of dense parts. `TORCH` runs on any device. It is the reference for
`triton_kernels.TRITON`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_dist.model.layers import norm_for_router, project, rms_norm, rotate, token_losses


class DenseKernels(NamedTuple):
    """Functions with the arguments, results and gradients of the functions in `layers` with the same names.

    The arguments of `norm_and_rotate` are queries or keys [B, S, H, d], the weight [d] or [H d] and eps of their norm, and
    `table` and `pairs` of `rotate`. It returns the result of `rms_norm` and then `rotate`, [B, H, S, d]. It returns None if
    the caller must call these two functions instead.
    """

    rotate: Callable[..., Tensor] = rotate
    token_losses: Callable[[Tensor, Tensor], Tensor] = token_losses
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    norm_for_router: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = norm_for_router
    project: Callable[..., tuple[Tensor, ...]] = project
    norm_and_rotate: Callable[..., Tensor | None] = lambda *_: None


TORCH = DenseKernels()
