"""The true (not null) experts of this rank: SwiGLU FFNs. The weights of each expert group are stacked in one tensor, and
input rows are sorted by slot (the expert's place on this rank).

Shape letters: Q (token, expert) pairs computed here, R dispatched rows, D hidden size, F hidden width of a group's experts,
e number of a group's experts on this rank.

Two functions compute the experts of a group, `loop_swiglu` and `grouped_swiglu`, with the same contract:

    swiglu(x_QD, gate, up, down, counts, activate)  ->  y_QD

gate, up [e, F, D] and down [e, D, F] have the dtype of x. `counts`, on the host, has the number of rows of each expert, in
order. Rows of x beyond the sum of `counts` belong to no expert, have no output, and get a zero gradient. The weights
of an expert without rows get a zero gradient, not None. `activate(gate_QF, up_QF, rows)` returns the hidden values of a
slice of rows, by default silu(gate) * up. `grouped_swiglu` also takes gate and up as one stack [e, 2 F, D], with None for
`up`: one matrix product then reads x once, and `activate` gets [Q, 2 F] and None. x may be a pair of tensors with equal
values, one for the product with gate and one for the product with up, so that each product has a gradient of its own.

Tests on CPU with torch 2.13 show what `torch.nn.functional.grouped_mm` accepts: fp32, bf16 and fp16, not float64; int32
offsets; strides in multiples of 16 bytes, so D and F in multiples of 8 (bf16, fp16) or 4 (fp32). `grouped_mm` leaves the
rows beyond the last offset uninitialised, in the output and in the gradient. On CUDA, by torch's documentation,
`grouped_mm` takes bf16 on compute capability 8.0 and up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout, RunExperts
from moe_dist.moe.kernels.interface import Items, RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH, gate_and_up
from moe_dist.moe.routing.draws import recomputed
from moe_dist.placement.parameter_names import Role, group_module
from moe_dist.placement.placement import ExpertGroup

ExpertGemm = Literal["auto", "grouped", "loop"]
Activation = Callable[[Tensor, Tensor | None, slice], Tensor]  # the top of this file explains `Activation` and `Inputs`
Inputs = Tensor | tuple[Tensor, Tensor]
StackedSwiGLU = Callable[[Inputs, Tensor, Tensor, Tensor, Sequence[int], Activation], Tensor]
RunStack = Callable[[Inputs, Sequence[int], Activation], Tensor]
ALIGNMENT = 16  # a stride must be a multiple of this many bytes
GROUPED_ON_CPU = 16  # number of experts from which grouped_mm (a C++ loop on CPU) was measured to be faster


def silu_product(gate_QF: Tensor, up_QF: Tensor | None, rows: slice) -> Tensor:
    gate_QF, up_QF = gate_and_up(gate_QF, up_QF)
    return F.silu(gate_QF) * up_QF


def rows_between(x: Tensor, start: int, end: int) -> Tensor:
    """Returns x[start:end], or x itself if the range has all rows, because the backward of a slice copies the gradient."""
    return x if (start, end) == (0, x.shape[0]) else x[start:end]


def inputs_between(x_QD: Inputs, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns the input rows for gate and for up: the same tensor twice if x is one tensor, so that one sum gives the
    gradient."""
    first, second = x_QD if isinstance(x_QD, tuple) else (x_QD, x_QD)
    cut = rows_between(first, start, end)
    return cut, cut if second is first else rows_between(second, start, end)


def row_slices(counts: Sequence[int]) -> list[slice]:
    """Returns the slice of input rows of each expert."""
    return [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]


def loop_swiglu(
    x_QD: Inputs, gate: Tensor, up: Tensor, down: Tensor, counts: Sequence[int], activate: Activation = silu_product
) -> Tensor:
    """Computes one expert after the other, for any dtype, device and width. An expert without rows is computed, too, so
    that the gradient of its weights is zero and not None."""
    # unbind, because the backward of an index would fill a whole weight stack with zeros for each expert
    stacks = [weight.unbind() for weight in (gate, up, down)]
    gate_runs, up_runs = (each.split(list(counts)) for each in inputs_between(x_QD, 0, sum(counts)))
    outputs = [
        F.linear(activate(F.linear(for_gate, gate), F.linear(for_up, up), place), down)
        for for_gate, for_up, place, gate, up, down in zip(gate_runs, up_runs, row_slices(counts), *stacks, strict=True)
    ]
    return torch.cat(outputs)


def grouped_swiglu(
    x_QD: Inputs, gate: Tensor, up: Tensor | None, down: Tensor, counts: Sequence[int], activate: Activation = silu_product
) -> Tensor:
    """Computes all experts by two or three grouped matrix products. Call this function only if `why_not_grouped` returns
    None."""
    if not sum(counts):  # without rows no grouped kernel is called
        first, second = gate.chunk(2, dim=1) if up is None else (gate, up)
        return loop_swiglu(x_QD, first, second, down, counts, activate)
    for_gate_QD, for_up_QD = inputs_between(x_QD, 0, sum(counts))
    product = grouped_product(counts, for_gate_QD.device)
    up_QF = None if up is None else product(for_up_QD, up)
    return product(activate(product(for_gate_QD, gate), up_QF, slice(0, sum(counts))), down)


def grouped_product(counts: Sequence[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function (x [Q, I], stack [e, O, I]) -> y [Q, O] that multiplies each expert's rows with the expert's
    matrix, by one grouped product. At least one expert must have a row."""
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32).to(device, non_blocking=True)  # does not sync
    empty = [expert for expert, count in enumerate(counts) if not count]

    def product(x_QI: Tensor, weight_eOI: Tensor) -> Tensor:
        weight_eOI = _zero_gradient_of(weight_eOI, empty) if empty else weight_eOI
        y_QO = F.grouped_mm(x_QI, weight_eOI.transpose(-2, -1), offs=offsets)
        if y_QO.requires_grad:
            y_QO.register_hook(Tensor.contiguous)  # grouped_mm refuses gradients of stride 0, which `expand` makes
        return y_QO

    return product


def choose_gemm(
    kind: ExpertGemm, *, dtype: torch.dtype, device: torch.device, widths: Sequence[int], num_experts: int
) -> StackedSwiGLU:
    """Chooses the function that computes `num_experts` experts with the widths D and F. Each forward may call it.

    On CUDA `auto` chooses `grouped_swiglu` if `why_not_grouped` allows it, because a grouped product is one kernel instead
    of one per expert. On CPU `auto` chooses `grouped_swiglu` only for GROUPED_ON_CPU or more experts (docs/parallelism.md).

    Raises:
        ValueError: kind is `grouped`, and `why_not_grouped` returns a reason.
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
    """Returns the reason why `grouped_swiglu` cannot be used, or None if `grouped_swiglu` can be used."""
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


def _zero_gradient_of(weight: Tensor, experts: list[int]) -> Tensor:
    """Returns the weight with a hook that sets the gradients of `experts` to 0, because torch does not document the
    gradient that the grouped product's backward writes for an expert without rows."""

    def zero(gradient: Tensor) -> Tensor:
        for expert in experts:
            gradient[expert].zero_()  # in place, because no other product uses this gradient's buffer
        return gradient

    weight = weight.view_as(weight)  # a view, because a hook on the parameter would persist after this forward
    if weight.requires_grad:
        weight.register_hook(zero)
    return weight


class _WorkingCopy(torch.autograd.Function):
    """Returns a copy of one or more weights (in another dtype, joined along dim 1), for use instead of the weights.
    Backward passes the copy's gradient to the weights, in the weights' dtype. If a weight has a gradient already, one pass
    converts the new gradient and adds it in place."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, *weights: Tensor) -> Tensor:
        ctx.weights = weights  # not save_for_backward, because backward does not need the parameters' values
        return copy.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = gradient.split([each.shape[1] for each in ctx.weights], dim=1)
        return None, *map(_added_or_converted, ctx.weights, parts)


def _added_or_converted(weight: Tensor, gradient: Tensor) -> Tensor | None:
    if weight.grad is None:
        return gradient.to(weight.dtype)
    weight.grad.add_(gradient)
    return None


class ExpertStack(nn.Module):
    """The experts of one group on this rank: `gate`, `up` [e, F, D] and `down` [e, D, F].

    Each forward pass converts weights to the rows' dtype if it differs, unless `keep_copies` keeps the converted copies.
    """

    role = Role.EXPERT

    def __init__(self, hidden_dim: int, ffn_dim: int, num_local: int, *, gemm: ExpertGemm = "loop") -> None:
        super().__init__()
        self.widths = (hidden_dim, ffn_dim)
        self.gemm: ExpertGemm = gemm
        self.gate = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_local, hidden_dim, ffn_dim))
        self._copies: dict[str, Tensor] | None = None  # converted weights by name; None if copies are not kept

    def keep_copies(self, keep: bool) -> None:
        """Keeps converted weights for further forward passes if `keep`, else drops the copies. Kept copies take 2 bytes per
        bf16 parameter, and do not follow a change of the weights: keep copies only while no weight changes."""
        self._copies = (self._copies or {}) if keep else None

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns the weight `name` in `dtype`, with gradient. Under FSDP2 a sharded weight already has the rows' dtype."""
        weight = self.get_parameter(name)
        if weight.dtype == dtype or self._copies is None:
            return weight.to(dtype)
        copy = self._copies.get(name)
        if copy is None or copy.dtype != dtype:
            copy = self._copies[name] = weight.detach().to(dtype)
        return _WorkingCopy.apply(copy, weight)  # pyright: ignore[reportReturnType]

    def _gate_up(self, copies: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the weights of gate and up as one stack [e, 2 F, D]. Copying the stack costs as much as copying gate and
        up."""
        copy, width = copies.get("gate_up"), self.widths[1]
        if copy is None or copy.dtype != dtype:
            copy = self.gate.detach().new_empty((self.gate.shape[0], 2 * width, self.gate.shape[2]), dtype=dtype)
            copy[:, :width], copy[:, width:] = self.gate.detach(), self.up.detach()
            copies["gate_up"] = copy
        return _WorkingCopy.apply(copy, self.gate, self.up)  # pyright: ignore[reportReturnType]

    def forward(self, x_QD: Inputs, counts: Sequence[int], activate: Activation = silu_product) -> Tensor:
        """Applies each expert to its block of consecutive rows: x [sum(counts), D] -> y [sum(counts), D]."""
        if not counts:
            # An empty stack gets no gradient, because FSDP2's reduce-scatter refuses empty tensors but skips a parameter
            # without a gradient. FSDP2 shards a stack over ranks with the same experts, so the stack is empty on all
            # these ranks, and all skip it.
            return inputs_between(x_QD, 0, 0)[0]
        like = x_QD[0] if isinstance(x_QD, tuple) else x_QD
        swiglu = choose_gemm(self.gemm, dtype=like.dtype, device=like.device, widths=self.widths, num_experts=len(counts))
        if swiglu is grouped_swiglu:
            return grouped_swiglu(x_QD, *self.grouped_weights(like.dtype), counts, activate)
        gate, up, down = (self.weight(name, like.dtype) for name in ("gate", "up", "down"))
        return swiglu(x_QD, gate, up, down, counts, activate)

    def grouped_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the weights for `grouped_swiglu`: gate and up are one stack if a converted copy is kept."""
        down = self.weight("down", dtype)
        if self._copies is not None and self.gate.dtype != dtype:
            return self._gate_up(self._copies, dtype), None, down
        return self.weight("gate", dtype), self.weight("up", dtype), down


class Experts(nn.Module):
    """All true (not null) experts of this rank, one `ExpertStack` per group.

    A group without experts on this rank has a stack [0, F, D], so that all ranks have the same FSDP2 units and gather these
    units in the same order. Without the empty stack, FSDP2's prefetch on one rank ran ahead of other ranks' exchanges, and
    all ranks hung.

    Args:
        hidden_dim: D.
        groups: All expert groups in logical order, which is also the order of this rank's slots.
        num_local: Number of experts of each group on this rank.
        pair_budget: Largest number of (token, expert) pairs computed at once; None for no bound. If there are more pairs,
            chunks of pairs are computed, which backward recomputes, so that unbalanced routing costs time but no more
            memory.
        gemm: See `choose_gemm`.
        stack: Makes the stack of a group, with the arguments of `ExpertStack`.
        kernels: Functions that gather rows, compute silu(gate) * up, and sum pairs.
    """

    def __init__(
        self,
        hidden_dim: int,
        groups: Sequence[ExpertGroup],
        num_local: Sequence[int],
        *,
        pair_budget: int | None = None,
        gemm: ExpertGemm = "loop",
        stack: Callable[..., ExpertStack] = ExpertStack,
        kernels: RowKernels = TORCH,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.local = tuple((group.name, count) for group, count in zip(groups, num_local, strict=True))
        self.pair_budget = pair_budget
        for group, count in zip(groups, num_local, strict=True):
            self.add_module(group_module(group.name), stack(hidden_dim, group.ffn_dim, count, gemm=gemm))

    def start(self, h_TD: Tensor, *, recompute: bool = False) -> tuple[Tensor, RunExperts]:
        """Begins the forward of a layer, before any row is sent. Returns the layer's input, which the dispatcher sends, and
        `forward` for one call or several."""
        return h_TD, partial(self, recompute=recompute)

    def forward(self, dispatched: DispatchedRows, plan: PairLayout, *, recompute: bool = False) -> Tensor:
        """Returns for each dispatched row the weighted sum of its experts' outputs: [R, D] in the rows' dtype, summed in
        fp32 and rounded once. With `recompute`, backward computes the FFNs again instead of keeping their activations."""
        stacks = [(count, self.get_submodule(group_module(name))) for name, count in self.local]
        return self._run(dispatched, plan, stacks, recompute=recompute)

    def _run(
        self, dispatched: DispatchedRows, plan: PairLayout, stacks: Sequence[tuple[int, RunStack]], *, recompute: bool
    ) -> Tensor:
        """See `forward`. `stacks` has, for each stack of this rank, the stack's number of slots and a function with the
        arguments of `ExpertStack.forward`."""
        rows_RD, weight_Q = dispatched.rows_RD, dispatched.weight_Q
        budget = self.pair_budget or sum(plan.slot_counts)
        out_RD: Tensor | None = None
        chunks = slot_chunks(plan.slot_counts, budget)
        recompute = recompute or len(chunks) > 1  # keeping the activations of all chunks would exceed the budget
        dtype = weight_Q.dtype if len(chunks) > 1 else rows_RD.dtype
        whole = len(chunks) == 1
        items = dispatched.items if whole else None  # the items of all pairs
        in_order = dispatched.sorted_pairs and whole
        at = 0
        for counts in chunks:
            end = at + sum(counts)
            row_Q, weights = (rows_between(each, at, end) for each in (plan.row_of_pair_Q, weight_Q))
            if recompute:
                part_RD = recomputed(self._weighted_sum, stacks, rows_RD, weights, row_Q, counts, dtype, items, in_order)
            else:
                part_RD = self._weighted_sum(stacks, rows_RD, weights, row_Q, counts, dtype, items, in_order)
            # `+` saves no tensor for backward: a recomputed chunk of pairs keeps its arguments, but no activation of its
            # pairs.
            out_RD = part_RD if out_RD is None else out_RD + part_RD
            at = end
        assert out_RD is not None, "there is always one chunk"
        return out_RD.to(rows_RD.dtype)  # a sum of chunks is rounded only here

    def _weighted_sum(
        self,
        stacks: Sequence[tuple[int, RunStack]],
        rows_RD: Tensor,
        weight_Q: Tensor,
        row_Q: Tensor,
        counts: Sequence[int],
        dtype: torch.dtype,
        items: Items | None,
        in_order: bool,
    ) -> Tensor:
        """Computes the pairs of one chunk. Returns the sum of each row's weighted outputs, [R, D] in `dtype`."""
        index = RowIndex((row_Q,), rows_RD.shape[0], items, in_order)
        inputs = self.kernels.gather(rows_RD, index)  # one copy of a row per pair
        outputs, at, slot = [], 0, 0
        for num_local, stack in stacks:
            group_counts = counts[slot : slot + num_local]
            end = at + sum(group_counts)
            activate = partial(self._activate, rows_between(weight_Q, at, end))
            outputs.append(stack(inputs_between(inputs, at, end), group_counts, activate))
            at, slot = end, slot + num_local
        y_QD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # a cat copies as many bytes as the gather
        return self.kernels.sum_pairs(y_QD, weight_Q, index, dtype)

    def _activate(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None, rows: slice) -> Tensor:
        return self.kernels.swiglu(rows_between(weight_Q, rows.start, rows.stop), gate_QF, up_QF)


def slot_chunks(counts: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Cuts pairs that are sorted by slot into chunks of at most `budget` pairs. Returns per chunk the number of pairs of
    each slot. There is at least one chunk, so that the gradients of experts without rows are zero and not None."""
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
