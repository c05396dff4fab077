"""Multiplies input rows, sorted by expert, with their experts' matrices: by one grouped product, or expert by expert.

Tests on CPU with torch 2.13 show what `torch.nn.functional.grouped_mm` accepts: fp32, bf16 and fp16, not float64; int32
offsets; strides in multiples of 16 bytes, so widths in multiples of 8 (bf16, fp16) or 4 (fp32). `grouped_mm` leaves the
rows beyond the last offset uninitialised, in the output and in the gradient. On CUDA, by torch's documentation,
`grouped_mm` takes bf16 on compute capability 8.0 and up.

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
    """Returns a function (x [Q, I], stack [e, O, I]) -> y [Q, O] that multiplies each expert's rows with the expert's
    matrix, by one grouped product. At least one expert must have a row."""
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(device, non_blocking=True)  # does not sync
    empty = [expert for expert, count in enumerate(counts) if not count]

    def clear(gradient_eOI: Tensor) -> Tensor:
        for expert in empty:
            gradient_eOI[expert].zero_()  # in place, because no other product uses this gradient's buffer
        return gradient_eOI

    return offset_product(offsets, clear if empty else None)


def offset_product(offsets_e: Tensor, clear: Callable[[Tensor], Tensor] | None) -> Product:
    """Returns a function that multiplies rows with a stack; int32 offsets on the device say where each expert's rows end.
    `clear` sets the gradients of experts without rows to zero, because torch does not document their values."""

    def product(x_QI: Tensor, weight_eOI: Tensor) -> Tensor:
        if clear is not None:
            weight_eOI = weight_eOI.view_as(weight_eOI)  # a hook on the parameter would persist after this forward
            if weight_eOI.requires_grad:
                weight_eOI.register_hook(clear)
        y_QO = F.grouped_mm(x_QI, weight_eOI.transpose(-2, -1), offs=offsets_e)
        if y_QO.requires_grad:
            y_QO.register_hook(Tensor.contiguous)  # grouped_mm refuses gradients of stride 0, which `expand` makes
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
