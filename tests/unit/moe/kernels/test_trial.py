"""The trial of kernels accepts correct kernels in Triton's interpreter, and names the fault of a wrong kernel."""

from typing import Any

import pytest
import torch

from moe_dist.moe.kernel_choice import why_not
from moe_dist.moe.kernels.operation import LARGEST_BLOCK
from moe_dist.moe.kernels.triton_kernels import TRITON, TritonKernels
from tests.support.cover import full

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "default"), [full(torch.float32, "meta"), full(torch.bfloat16, "cpu")])
def test_good_kernels_pass(dtype: torch.dtype, default: str) -> None:
    """The trial runs on the kernels' device, whatever torch's default device is."""
    with torch.device(default):
        assert why_not(TRITON, CPU, dtype) is None


def double_sum(*args: Any) -> torch.Tensor:
    return 2.0 * TRITON.sum_pairs(*args)


def forgotten_row(own: torch.Tensor, *args: Any) -> torch.Tensor:
    return TRITON.sum_rows(torch.cat([torch.full_like(own[:1], float("nan")), own[1:]]), *args)


def wrong_gradient(rows: torch.Tensor, index: Any) -> Any:
    return TRITON.gather(rows * 2.0 - rows.detach(), index)


def late_choice(logits: torch.Tensor, *args: Any) -> Any:
    return TRITON.choose(logits.roll(1, 0), *args)


def double_probabilities(*args: Any) -> Any:
    made = TRITON.choose(*args)
    return made._replace(prob_C=2.0 * made.prob_C)


def first_block_alone(*args: Any) -> torch.Tensor:
    hidden = TRITON.swiglu(*args)
    return torch.where(torch.arange(hidden.shape[1]) < LARGEST_BLOCK, hidden, 0.0)


def no_compiler(*args: Any) -> Any:
    raise RuntimeError("PassManager::run failed\nsee above")


@pytest.mark.parametrize(
    ("method", "fault", "words"),
    [
        ("sum_pairs", double_sum, "the output of experts of the Triton kernels differs from torch's by 1"),
        full("sum_rows", forgotten_row, "the sum of rows of the Triton kernels differs from torch's by nan"),
        full("gather", wrong_gradient, "the gradient of rows of the Triton kernels differs from torch's by 1"),
        full("choose", late_choice, "the choice of the Triton kernels differs from torch's by"),
        full("choose", double_probabilities, "the probabilities of the Triton kernels differs from torch's by 1"),
        full("swiglu", first_block_alone, "the output of experts of the Triton kernels differs from torch's by"),
        full("swiglu", no_compiler, "the Triton kernels failed: RuntimeError: PassManager::run failed"),
    ],
)
@pytest.mark.slow
def test_a_fault_is_named(method: str, fault: Any, words: str) -> None:
    kernels = TritonKernels()
    setattr(kernels, method, fault)
    reason = why_not(kernels, CPU, torch.float32)
    assert reason.startswith("in a trial on cpu the")
    assert words in reason
    assert "see above" not in reason
