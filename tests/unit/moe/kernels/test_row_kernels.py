"""In Triton's interpreter the kernels for rows give the same values and gradients as torch in float64.

The kernels' block sizes do not divide the widths and the numbers of rows. When it stores bf16, the interpreter
truncates, but a GPU rounds. bf16 results may therefore differ by two units in the last place.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.kernels.interface import RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH, add_rows
from moe_dist.moe.kernels.triton_kernels import TRITON
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup
from tests.support.cover import full_unless
from tests.support.one_rank_layer import context_of, one_rank_layer

SHAPES = {  # (pairs, rows, width)
    "uneven": (13, 5, 24),
    "a row without pairs": (3, 40, 7),
    "several blocks": (4, 2, 2056),
    "one": (1, 1, 1),
    "no pairs": (0, 3, 8),
    "no rows": (0, 0, 8),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}  # bf16: two units in the last place
CASES = list(product(SHAPES, TOLERANCE))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    scale = float(exact.detach().abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=TOLERANCE[dtype] * max(scale, 1.0))


def against_torch(run: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Compares results and gradients with torch in float64."""
    exact = [each.detach().double().requires_grad_() for each in inputs]
    results, expected = run(TRITON, *inputs), run(TORCH, *exact)
    directions = [torch.randn_like(each) for each in results]
    ours = torch.autograd.grad(results, inputs, directions)
    theirs = torch.autograd.grad(expected, exact, [each.double() for each in directions])
    for got, wanted in zip((*results, *ours), (*expected, *theirs), strict=True):
        close(got, wanted, dtype)
    assert [each.dtype for each in ours] == [each.dtype for each in inputs]


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gathered_rows_and_the_sums_of_both_gradients(shape: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_pairs, num_rows, width = SHAPES[shape]
    index = RowIndex((torch.randint(0, max(1, num_rows), (num_pairs,)),), num_rows)
    rows = drawn(num_rows, width, dtype=dtype)
    gathered, again = TRITON.gather(rows, index)
    assert torch.equal(gathered, rows.index_select(0, index.parts[0]))
    assert gathered.data_ptr() == again.data_ptr()
    against_torch(lambda kernels, rows: [x * 1 for x in kernels.gather(rows, index)], [rows], dtype)
    # one matrix product gives gate and up
    against_torch(lambda kernels, rows: [kernels.gather(rows, index)[0] * 1], [rows], dtype)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_weighted_pairs(shape: str, dtype: torch.dtype) -> None:
    """Tests `swiglu` and `sum_pairs` together, because either of them may multiply by the weights."""
    torch.manual_seed(0)
    num_pairs, num_rows, width = SHAPES[shape]
    index = RowIndex((torch.randint(0, max(1, num_rows), (num_pairs,)),), num_rows)
    inputs = [drawn(num_pairs), drawn(num_pairs, width, dtype=dtype), drawn(num_pairs, width, dtype=dtype)]

    def run(kernels: RowKernels, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor) -> list[Tensor]:
        # transposed tensors detect a kernel that assumes contiguous strides
        gate_QF, up_QF = gate_QF.T.contiguous().T, up_QF.T.contiguous().T
        return [
            kernels.sum_pairs(hidden, weight_Q, index, torch.promote_types(gate_QF.dtype, torch.float32))
            for hidden in (
                kernels.swiglu(weight_Q, gate_QF, up_QF),
                kernels.swiglu(weight_Q, torch.cat([gate_QF, up_QF], dim=1), None),  # gate and up as one product
            )
        ]

    against_torch(run, inputs, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_pairs_that_are_sorted_already_are_not_moved(dtype: torch.dtype) -> None:
    """If the dispatcher has sorted the rows by expert, rows are not gathered and not summed. Values and gradients still
    equal torch's."""
    torch.manual_seed(0)
    num_pairs, width = 13, 24
    sorted_index = RowIndex((torch.arange(num_pairs),), num_pairs, in_order=True)
    inputs = [drawn(num_pairs), drawn(num_pairs, width, dtype=dtype)]
    gathered, again = TRITON.gather(inputs[1], sorted_index)
    assert gathered.data_ptr() == again.data_ptr() == inputs[1].data_ptr()
    assert TRITON.sum_pairs(inputs[1], inputs[0], sorted_index, dtype).data_ptr() == inputs[1].data_ptr()

    def run(kernels: RowKernels, weight_Q: Tensor, rows_QD: Tensor) -> list[Tensor]:
        gate_QD, up_QD = kernels.gather(rows_QD, sorted_index)
        hidden = kernels.swiglu(weight_Q, gate_QD * 1, up_QD * 2)
        return [kernels.sum_pairs(hidden, weight_Q, sorted_index, torch.promote_types(dtype, torch.float32))]

    against_torch(run, inputs, dtype)


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_own_and_received_rows(shape: str, dtype: torch.dtype, base: bool) -> None:
    torch.manual_seed(0)
    num_received, num_rows, width = SHAPES[shape]
    num_own = num_rows // 2
    index = RowIndex((torch.randperm(num_rows)[:num_own], torch.randint(0, max(1, num_rows), (num_received,))), num_rows)
    own, received = drawn(num_own, width, dtype=dtype).detach(), drawn(num_received, width, dtype=dtype).detach()
    base_MD = drawn(num_rows, width, dtype=dtype).detach() if base else None
    ours = TRITON.sum_rows(own, lambda: received, index, base_MD)
    exact = TORCH.sum_rows(own.double(), received.double, index, None if base_MD is None else base_MD.double())
    assert ours.dtype == dtype
    close(ours, exact, dtype)


def test_sums_have_the_bits_of_sums_in_the_order_of_the_pairs() -> None:
    torch.manual_seed(0)
    index = RowIndex((torch.randint(0, 3, (200,)),), 3)
    # Magnitudes differ, so that a different order of summation would give different bits.
    rows = drawn(200, 9).detach() * 10.0 ** torch.randint(-4, 4, (200, 1))
    in_order = add_rows(torch.zeros(3, 9), index.parts[0], rows)
    assert torch.equal(TRITON.sum_pairs(rows, rows[:, 0], index, torch.float32), in_order)
    assert not torch.equal(add_rows(torch.zeros(3, 9), index.parts[0].flip(0), rows.flip(0)), in_order)


GROUPS = (ExpertGroup("text", 4, 2, 2, 16, 0, ("text",)), ExpertGroup("image", 2, 1, 1, 8, 4, ("image",)))
BATCHES = {
    "both groups": [0, 1, -1, 0, 0, 1, 0, 1, 1, 0, 0],
    "one group": [0] * 7,  # the experts of the other group have no pair
    "all null": [0, 1, 0, 1],
    "padding alone": [-1, -1],
}


def make_layer(kernels: RowKernels, dtype: torch.dtype, budget: int | None, overlap: bool) -> MoELayer:
    torch.manual_seed(0)
    context = context_of(GROUPS, kernels=kernels)
    dispatcher = PipelinedDispatcher(context, overlap=True, chunks=2) if overlap else AllToAllDispatcher(context)
    options: dict[str, Any] = {"pair_budget": budget, "gemm": "auto", "kernels": kernels}
    options["recompute"] = "experts" if budget else "none"
    layer = one_rank_layer(TopKRouter(RouterContext(8, GROUPS)), 8, dispatcher=dispatcher, **options)
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.float() if "router" in name else parameter.data.to(dtype)
    return layer


@pytest.mark.parametrize(
    ("batch", "budget", "overlap", "dtype"),
    full_unless(
        lambda batch, budget, overlap, dtype: (dtype == torch.bfloat16) != overlap,
        [(*case, dtype) for case in [*product(BATCHES, [None], [False]), ("both groups", 5, True)] for dtype in TOLERANCE],
    ),
)
def test_a_layer(dtype: torch.dtype, batch: str, budget: int | None, overlap: bool) -> None:
    groups = torch.tensor(BATCHES[batch])
    results = []
    for kernels in (TRITON, TORCH):
        layer = make_layer(kernels, dtype, budget, overlap)
        x_TD = torch.linspace(-1, 1, 8 * len(groups)).view(-1, 8).sin().to(dtype).requires_grad_()
        if batch == "all null":
            for name, parameter in layer.router.named_parameters():
                parameter.data = parameter.data.abs() * (1 if "null" in name else -1)
            x_TD = x_TD.detach().abs().requires_grad_()
        y_TD, report = layer(x_TD, groups)
        assert batch != "all null" or report.sent.pairs == 0
        inputs = [x_TD, *layer.parameters()]
        direction = torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD).to(dtype)
        gradients = torch.autograd.grad((y_TD * direction).sum(), inputs, allow_unused=True)
        results.append([y_TD, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            close(ours, theirs, dtype)
