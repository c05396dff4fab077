"""Multiplies input rows, sorted by expert, with the matrices of their experts in one grouped product.

In tests on CPU with torch 2.13, `torch.nn.functional.grouped_mm` accepts fp32, bf16 and fp16, but not float64. Offsets must
be int32, and strides multiples of 16 bytes, so widths must be multiples of 8 (bf16, fp16) or 4 (fp32). `grouped_mm` does
not initialise rows beyond the last offset, in the output and in the gradient. According to torch's documentation, it
accepts bf16 on CUDA with compute capability 8.0 and up.

Shape letters: Q rows of a stack, e experts of a stack, I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertGemm = Literal["auto", "grouped", "loop"]
Product = Callable[[Tensor, Tensor], Tensor]  # (x [Q, I], weights [e, O, I], or [O, I] of one expert) -> y [Q, O]
ALIGNMENT = 16  # a stride must be a multiple of this many bytes


def grouped_product(counts: Sequence[int], device: torch.device) -> Product:
    """Returns a function (x [Q, I], stack [e, O, I]) -> y [Q, O]. It multiplies each expert's rows with the expert's matrix
    in one grouped product. At least one expert must have a row."""
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(device, non_blocking=True)  # does not sync
    empty = [expert for expert, count in enumerate(counts) if not count]

    def clear(gradient_eOI: Tensor) -> Tensor:
        for expert in empty:
            gradient_eOI[expert].zero_()  # in place, because no other product uses this gradient's buffer
        return gradient_eOI

    return offset_product(offsets, clear if empty else None)


def offset_product(offsets_e: Tensor, clear: Callable[[Tensor], Tensor] | None) -> Product:
    """Returns a function that multiplies rows with a stack. `offsets_e` (int32, on the device) has the end of each expert's
    rows. `clear` sets the gradients of experts without rows to zero, because torch leaves their values undocumented."""

    def product(x_QI: Tensor, weight_eOI: Tensor) -> Tensor:
        if clear is not None:
            weight_eOI = weight_eOI.view_as(weight_eOI)  # a hook on the parameter would persist after this forward
            if weight_eOI.requires_grad:
                weight_eOI.register_hook(clear)
        y_QO = F.grouped_mm(x_QI, weight_eOI.transpose(-2, -1), offs=offsets_e)
        if y_QO.requires_grad:
            y_QO.register_hook(Tensor.contiguous)  # grouped_mm rejects gradients of stride 0, as `expand` makes them
        return y_QO

    return product


def why_not_grouped(dtype: torch.dtype, device: torch.device, widths: Sequence[int]) -> str | None:
    """Returns the reason why products cannot be grouped, or None."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm, which came with 2.11"
    if device.type == "cuda" and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(device) < (8, 0)):
        return "on CUDA torch has a grouped kernel for bf16 on compute capability 8.0 and up only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch has no grouped product in {dtype}"
    odd = [width for width in widths if width * dtype.itemsize % ALIGNMENT]
    if odd:
        step = ALIGNMENT // dtype.itemsize
        return f"hidden_dim and ffn_dim must be multiples of {step} in {dtype}, not {', '.join(map(str, odd))}"
    return None
