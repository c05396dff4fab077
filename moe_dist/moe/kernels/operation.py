"""Registers functions that launch Triton kernels as operations of torch.

On real tensors an operation launches its kernel; on fake tensors the operation only allocates the result. A kernel count
made without a GPU thus counts the operation as one kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

NAMESPACE = "moe_dist"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LARGEST_BLOCK = 1024  # elements of a row that one program of 4 warps has in registers: 16 bytes of bf16 for each thread


def operation(schema: str) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Any]]:
    """Decorates a generator function, which yields the allocated result and then launches the kernel that fills the result.

    Returns a function that calls the operation `moe_dist::NAME` with the given schema. The operation makes its tensors
    contiguous first, because the kernels read no strides: the gradient of a sum, for example, has stride 0. The operation
    has no gradient.
    """

    def decorate(function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)

        def run(*args: Any) -> Any:
            steps = function(*args)
            out = next(steps)
            next(steps, None)
            return out

        for device in ("CUDA", "CPU"):  # on the CPU by Triton's interpreter
            LIBRARY.impl(name, run, device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: next(function(*args)), lib=LIBRARY)
        call = getattr(getattr(torch.ops, NAMESPACE), name)
        return lambda *args: call(*(each.contiguous() if isinstance(each, torch.Tensor) else each for each in args))

    return decorate


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches a kernel, unless its grid is empty, which CUDA refuses."""
    if 0 not in grid:
        kernel[grid](*args, **constants)


def block_of(width: int) -> int:
    """Returns the number of elements of a row that one Triton program computes."""
    return min(LARGEST_BLOCK, triton.next_power_of_2(width))
