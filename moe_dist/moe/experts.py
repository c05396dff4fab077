"""The true experts on this rank: SwiGLU FFNs, stacked by group, run over rows sorted by slot.

Shape letters: Q pairs computed here, R rows, D hidden size, F hidden width of a group's experts, e a group's experts here.

Their products come in two ways with one contract, `loop` and `grouped`; a third is one more such function:

    swiglu(x_QD, gate, up, down, counts)  ->  y_QD

gate, up [e, F, D] and down [e, D, F] are in the dtype of x; counts, on the host, are each expert's rows, in order. Rows of
x beyond their sum belong to no expert: they have no output and a zero gradient. An expert without rows gets a zero
gradient, not None.

What `torch.nn.functional.grouped_mm` of torch 2.13 takes, found by running it on CPU: fp32, bf16 and fp16, in a loop in
C++; offsets in int32; strides in multiples of 16 bytes, so D and F in multiples of 8 (bf16, fp16) or 4 (fp32); no float64.
What lies beyond the last offset stays uninitialised, in the output and in the gradient. On CUDA, by its documentation, the
kernel takes bf16 on compute capability 8.0 and up.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.dispatch.rows import gather_rows, weighted_row_sum
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.roles import Role, group_module

ExpertGemm = Literal["auto", "grouped", "loop"]
StackedSwiGLU = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]  # see the top of this file
ALIGNMENT = 16  # bytes of a stride
GROUPED_ON_CPU = 16  # experts of a group on a rank, from which the loop in C++ was measured to be faster


def loop_swiglu(x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """One expert after the other; any dtype, device and width. Three products an expert, empty ones included, so that an
    expert without rows has its zero gradient."""
    # unbind, not indexing: the backward of an index would fill a whole stack with zeros for each expert.
    stacks = [weight.unbind() for weight in (gate, up, down)]
    runs = x_QD[: sum(counts)].split(list(counts))
    outputs = [
        F.linear(F.silu(F.linear(run, gate)) * F.linear(run, up), down)
        for run, gate, up, down in zip(runs, *stacks, strict=True)
    ]
    return torch.cat(outputs)


def grouped_swiglu(x_QD: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int]) -> Tensor:
    """Three grouped products for all experts. Use it where `why_not_grouped` says nothing.

    On CUDA the offsets are copied from the host, a few bytes that are queued and not waited for.
    """
    if not sum(counts):
        return loop_swiglu(x_QD, gate, up, down, counts)  # kernels are not called without a row
    x_QD = x_QD[: sum(counts)]
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(x_QD.device, non_blocking=True)
    empty = [expert for expert, count in enumerate(counts) if not count]
    if empty:
        gate, up, down = (_zero_gradient_of(weight, empty) for weight in (gate, up, down))
    hidden_QF = F.silu(_product(x_QD, gate, offsets)) * _product(x_QD, up, offsets)
    return _ContiguousGradient.apply(_product(hidden_QF, down, offsets))  # pyright: ignore[reportReturnType]


def choose_gemm(
    kind: ExpertGemm, *, dtype: torch.dtype, device: torch.device, widths: Sequence[int], num_experts: int
) -> StackedSwiGLU:
    """The function that computes `num_experts` experts whose D and F are `widths`.

    `auto` is grouped if CUDA has a kernel for it: one launch instead of one for each expert. On CPU both are loops, and
    grouped is used from the number of experts at which it was measured to be faster (docs/parallelism.md). Cheap enough to
    call in each forward.

    Raises:
        ValueError: `grouped` where it is not possible, with the reason.
    """
    few = device.type != "cuda" and num_experts < GROUPED_ON_CPU
    if kind == "loop" or (kind == "auto" and few):
        return loop_swiglu
    reason = why_not_grouped(dtype, device, widths)
    if reason is None:
        return grouped_swiglu
    if kind == "auto":
        return loop_swiglu
    raise ValueError(f"parallel.expert_gemm=grouped: {reason}; take loop or auto (docs/parallelism.md)")


def why_not_grouped(dtype: torch.dtype, device: torch.device, widths: Sequence[int]) -> str | None:
    """Why the grouped product cannot be used, or None."""
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


def _product(x_QI: Tensor, weight_eOI: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x_QI, weight_eOI.transpose(-2, -1), offs=offsets)


class _ContiguousGradient(torch.autograd.Function):
    """Its input; backward lays an expanded gradient out in memory, as the grouped product refuses strides of 0."""

    @staticmethod
    def forward(ctx: Any, y_QD: Tensor) -> Tensor:
        return y_QD.view_as(y_QD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0].contiguous()


class _ZeroGradientOf(torch.autograd.Function):
    """The weight itself; backward writes zeros where an expert had no row: no document says what a kernel leaves there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, experts: list[int]) -> Tensor:
        ctx.experts = experts
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = grads
        for expert in ctx.experts:  # a fresh buffer that only this product holds
            gradient[expert].zero_()
        return gradient, None


def _zero_gradient_of(weight: Tensor, experts: list[int]) -> Tensor:
    return _ZeroGradientOf.apply(weight, experts)  # pyright: ignore[reportReturnType]


class ExpertStack(nn.Module):
    """Experts of one group on this rank: `gate`, `up` [e, F, D] and `down` [e, D, F].

    `gemm` is how their products are computed, see `moe_dist.moe.experts`.
    """

    role = Role.EXPERT

    def __init__(self, hidden_dim: int, ffn_dim: int, num_local: int, *, gemm: ExpertGemm = "loop") -> None:
        super().__init__()
        self.widths = (hidden_dim, ffn_dim)
        self.gemm: ExpertGemm = gemm
        self.gate = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_local, hidden_dim, ffn_dim))

    def forward(self, x_QD: Tensor, counts: Sequence[int]) -> Tensor:
        """SwiGLU of each expert over its run of rows: x [sum(counts), D] -> [sum(counts), D].

        An expert without rows has a zero gradient, not None.
        """
        if not counts:
            # An empty stack gets no gradient: FSDP2's reduce-scatter refuses empty tensors, and skips a stack without one.
            # Its edp peers hold the same experts, so they skip it too.
            return x_QD[:0]
        swiglu = choose_gemm(self.gemm, dtype=x_QD.dtype, device=x_QD.device, widths=self.widths, num_experts=len(counts))
        gate, up, down = (weight.to(x_QD.dtype) for weight in (self.gate, self.up, self.down))
        return swiglu(x_QD, gate, up, down, counts)


class Experts(nn.Module):
    """All true experts of this rank, one stack for each group.

    A group without slots here has an empty stack [0, F, D]: under FSDP2 every rank then has the same units, and so the same
    order of gathers; where a rank lacked one, its prefetch ran ahead of its peers' exchanges and all of them hung.

    Args:
        hidden_dim: D.
        groups: All groups in logical order; the rank's slots are sorted the same way.
        num_local: For each group its number of experts on this rank.
        pair_budget: Pairs computed at once; beyond it the pairs run in recomputed chunks, so that one expert that takes
            everything costs time, not memory. None for no bound.
        gemm: How the products are computed, see `moe_dist.moe.experts`.
    """

    def __init__(
        self,
        hidden_dim: int,
        groups: Sequence[ExpertGroup],
        num_local: Sequence[int],
        *,
        pair_budget: int | None = None,
        gemm: ExpertGemm = "loop",
    ) -> None:
        super().__init__()
        self.local = tuple((group.name, count) for group, count in zip(groups, num_local, strict=True))
        self.pair_budget = pair_budget
        for group, count in zip(groups, num_local, strict=True):
            self.add_module(group_module(group.name), ExpertStack(hidden_dim, group.ffn_dim, count, gemm=gemm))

    def forward(self, dispatched: DispatchedRows, plan: PairLayout, *, recompute: bool = False) -> Tensor:
        """Weighted sum over each row's pairs: [R, D] in the rows' dtype, summed in fp32 and rounded once.

        With `recompute` backward computes the FFNs again instead of keeping their activations.
        """
        rows_RD, weight_Q = dispatched.rows_RD, dispatched.weight_Q
        budget = self.pair_budget or sum(plan.slot_counts)
        out_RD: Tensor | None = None
        chunks = slot_chunks(plan.slot_counts, budget)
        recompute = recompute or len(chunks) > 1
        at = 0
        for counts in chunks:
            row_Q = plan.row_of_pair_Q[at : at + sum(counts)]
            weights = weight_Q[at : at + sum(counts)]
            if recompute:
                part_RD = checkpoint(
                    self._weighted_sum, rows_RD, weights, row_Q, counts, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part_RD = self._weighted_sum(rows_RD, weights, row_Q, counts)
            # Adding whole tables keeps no tensor: what a chunk keeps does not grow with its pairs.
            out_RD = part_RD if out_RD is None else out_RD + part_RD
            at += sum(counts)
        assert out_RD is not None, "there is always one chunk"
        return out_RD.to(rows_RD.dtype)

    def _weighted_sum(self, rows_RD: Tensor, weight_Q: Tensor, row_Q: Tensor, counts: Sequence[int]) -> Tensor:
        """The experts over some pairs, weighted and summed by row: [R, D] in the weights' dtype."""
        x_QD = gather_rows(rows_RD, row_Q)
        outputs, at, slot = [x_QD[:0]], 0, 0  # the empty slice ties a rank without experts into the graph
        for name, num_local in self.local:
            group_counts = counts[slot : slot + num_local]
            rows = x_QD[at : at + sum(group_counts)]
            outputs.append(self.get_submodule(group_module(name))(rows, group_counts))
            at, slot = at + sum(group_counts), slot + num_local
        return weighted_row_sum(torch.cat(outputs), weight_Q, row_Q, rows_RD.shape[0])


def slot_chunks(counts: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Cuts runs of pairs, slot by slot, into chunks of at most `budget` pairs; every chunk lists all slots.

    There is always one chunk at least, so that experts without rows still get their zero gradients.
    """
    total = sum(counts)
    starts = [sum(counts[:slot]) for slot in range(len(counts))]
    edges = range(0, total, budget) if total else [0]
    return [
        tuple(
            max(0, min(start + count, edge + budget) - max(start, edge))
            for start, count in zip(starts, counts, strict=True)
        )
        for edge in edges
    ]
