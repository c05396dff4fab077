"""Registers functions that launch Triton kernels as operations of torch.

On real tensors an operation launches its kernel. On fake tensors it only allocates the result. So a tool that counts
kernels on fake tensors, without a GPU, counts each operation as one kernel.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

NAMESPACE = "moe_dist"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LARGEST_BLOCK = 1024  # row elements in the registers of a program of 4 warps: 16 bytes of bf16 per thread


def operation(schema: str) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Any]]:
    """Decorates a generator function that yields the allocated result, and then launches the kernel that fills the result.

    Returns a function that calls the operation `moe_dist::NAME` with the given schema. The function first makes its tensors
    contiguous, because the kernels read no strides. The gradient of a sum, for example, has stride 0. The operation has no
    gradient.
    """

    def decorate(function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)

        def run(*args: Any) -> Any:
            steps = function(*args)
            out = next(steps)
            next(steps, None)
            return out

        for device in ("CUDA", "CPU"):  # on the CPU, Triton's interpreter runs it
            LIBRARY.impl(name, run, device)
        torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: next(function(*args)), lib=LIBRARY)
        call = getattr(getattr(torch.ops, NAMESPACE), name)
        return lambda *args: call(*(each.contiguous() if isinstance(each, torch.Tensor) else each for each in args))

    return decorate


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches a kernel, except with an empty grid, which CUDA refuses."""
    if 0 not in grid:
        kernel[grid](*args, **constants)


def block_of(width: int) -> int:
    """Returns the number of elements of a row that one Triton program computes."""
    return min(LARGEST_BLOCK, triton.next_power_of_2(width))
