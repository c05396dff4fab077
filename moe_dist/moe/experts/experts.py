"""The true (not null) experts of this rank. They are FFNs, whose weights are stacked in one tensor for each expert group.
Input rows are sorted by slot (the index of the expert on this rank).

    y = W_down a(W_gate x, W_up x)

`Experts` has an activation a (`activations.py`), an optional adapter of the matrices (`expert_lora.py`), and a storage. The
storage is `on_host` if the host knows each expert's number of rows, else `on_device` (static_storage.py). Replicas
(`replicas.py`) add experts for one forward.

Shape letters: Q (token, expert) pairs computed here, R dispatched rows, D hidden size, F hidden width of a group's experts,
e number of a group's experts on this rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout, RunExperts
from moe_dist.moe.experts.activations import SWIGLU, Activation
from moe_dist.moe.experts.expert_lora import ExpertLoRA
from moe_dist.moe.experts.products import ExpertGemm, Product, grouped_product, why_not_grouped
from moe_dist.moe.experts.working_copy import working_copy
from moe_dist.moe.kernels.interface import RowIndex, RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH, gate_and_up
from moe_dist.moe.routing.draws import recomputed
from moe_dist.placement.parameter_names import Role, group_module
from moe_dist.placement.placement import ExpertGroup

GROUPED_ON_CPU = 16  # from this number of experts on, grouped_mm (on CPU a C++ loop) was measured to be faster
Inputs = Tensor | tuple[Tensor, Tensor]  # the rows for gate and for up: equal values with separate gradients
Activate = Callable[[Tensor, Tensor | None, slice], Tensor]  # gate [Q, F], up [Q, F], and their slice of a stack's rows


@dataclass(frozen=True)
class Runs:
    """The rows of one stack. Each expert has a run of consecutive rows, whose length is on the host."""

    lengths: Sequence[int]

    @property
    def num_experts(self) -> int:
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        """Number of rows of x, padding included."""
        return sum(self.lengths)

    def counts(self) -> Sequence[int]:
        """Returns the number of rows of each expert, on the host."""
        return self.lengths

    def grouped(self, kind: ExpertGemm, like: Tensor, widths: Sequence[int]) -> bool:
        """Returns whether products of rows with the dtype and device of `like` are grouped."""
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        return choose_gemm(kind, widths=widths, num_experts=len(self.lengths), **options)

    def product(self, device: torch.device) -> Product:
        """Returns the grouped product, which needs at least one row."""
        return grouped_product(self.lengths, device)

    def of_rows(self, bias_eO: Tensor) -> Tensor:
        """Returns the bias of each row's expert, [Q, O]."""
        rows_e = from_host(self.lengths, torch.int64, bias_eO.device)
        return bias_eO.repeat_interleave(rows_e, dim=0, output_size=self.num_rows)


RunStack = Callable[[Inputs, Runs, Activate], Tensor]


def choose_gemm(
    kind: ExpertGemm, *, dtype: torch.dtype, device: torch.device, widths: Sequence[int], num_experts: int
) -> bool:
    """Returns whether one grouped product computes all `num_experts` experts, whose matrices have these widths.

    On CUDA `auto` means grouped if `why_not_grouped` allows it, because a grouped product is one kernel instead of one per
    expert. On CPU `auto` also needs at least GROUPED_ON_CPU experts (docs/parallelism.md). Raises ValueError if kind is
    `grouped` and `why_not_grouped` returns a reason."""
    few = device.type != "cuda" and num_experts < GROUPED_ON_CPU
    if kind == "loop" or (kind == "auto" and few):
        return False
    reason = why_not_grouped(dtype, device, widths)
    if reason is None:
        return True
    if kind == "auto":
        return False
    raise ValueError(f"parallel.expert_gemm=grouped: {reason}; take loop or auto (docs/parallelism.md)")


class Chunk(NamedTuple):
    """Some of this rank's (token, expert) pairs, which are computed at once. `make_index` takes the number of rows, and
    returns the row of each pair."""

    pairs: slice
    make_index: Callable[[int], RowIndex]
    runs: Sequence[Runs]


# Function that divides a plan's pairs into chunks. The last two arguments are each stack's number of slots, and the largest
# number of pairs in a chunk.
Storage = Callable[[DispatchedRows, Any, Sequence[int], int | None], list[Chunk]]


def on_host(dispatched: DispatchedRows, plan: PairLayout, slots: Sequence[int], budget: int | None) -> list[Chunk]:
    """Divides pairs into chunks of at most `budget` pairs. The host knows the number of pairs of each slot."""
    chunks = slot_chunks(plan.slot_counts, budget or sum(plan.slot_counts))
    known: dict[str, Any] = {"items": dispatched.items, "in_order": dispatched.sorted_pairs} if len(chunks) == 1 else {}
    found, at = [], 0
    for counts in chunks:
        end = at + sum(counts)
        runs = [Runs(counts[last - number : last]) for number, last in zip(slots, accumulate(slots), strict=True)]
        row_Q = rows_between(plan.row_of_pair_Q, at, end)
        found.append(Chunk(slice(at, end), partial(RowIndex, (row_Q,), **known), runs))
        at = end
    return found


def slot_chunks(counts: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    """Divides pairs, sorted by slot, into chunks of at most `budget` pairs. Returns for each chunk the number of pairs of
    each slot. There is at least one chunk, so that experts without rows get zero gradients instead of None."""
    runs = list(zip(counts, accumulate(counts), strict=True))
    edges = range(0, sum(counts), budget) if any(counts) else [0]
    return [tuple(max(0, min(end, edge + budget) - max(end - count, edge)) for count, end in runs) for edge in edges]


def rows_between(x: Tensor, start: int, end: int) -> Tensor:
    """Returns x[start:end], or x itself if this is all of x: the backward of a slice would copy the gradient."""
    return x if (start, end) == (0, x.shape[0]) else x[start:end]


def inputs_between(x_QD: Inputs, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Returns the input rows for gate and for up. If x is one tensor, both results are the same slice of it, so that one
    sum computes its gradient."""
    first, second = x_QD if isinstance(x_QD, tuple) else (x_QD, x_QD)
    cut = rows_between(first, start, end)
    return cut, cut if second is first else rows_between(second, start, end)


class ExpertStack(nn.Module):
    """The experts of one group on this rank: `gate`, `up` [e, F, D] and `down` [e, D, F]; with biases also `gate_bias`,
    `up_bias` [e, F] and `down_bias` [e, D].

    Each forward pass converts weights whose dtype differs from the rows', unless `keep_copies` keeps converted copies.
    """

    role = Role.EXPERT

    def __init__(
        self, hidden_dim: int, ffn_dim: int, num_local: int, *, gemm: ExpertGemm = "loop",
        activation: Activation = SWIGLU, adapter: ExpertLoRA | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.widths, self.activation, self.adapter = (hidden_dim, ffn_dim), activation, adapter
        self.gemm: ExpertGemm = gemm
        self.gate = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_local, ffn_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_local, hidden_dim, ffn_dim))
        biases = {"gate_bias": ffn_dim, "up_bias": ffn_dim, "down_bias": hidden_dim} if activation.has_bias else {}
        own = adapter.stacked(hidden_dim, ffn_dim) if adapter else {}
        for name, shape in [*((name, (width,)) for name, width in biases.items()), *own.items()]:
            self.register_parameter(name, nn.Parameter(torch.empty(num_local, *shape)))
        self.initial_values = dict.fromkeys(biases, 0.0)
        self.roles = dict.fromkeys(own, Role.EXPERT_ADAPTER)  # roles of parameters that differ from the stack's role
        self.adapters = adapter.modules(hidden_dim, ffn_dim) if adapter else None
        self.tensors = ("gate", "up", "down", *biases)  # the weights of an expert, without its adapter
        self._copies: dict[str, Tensor] | None = None  # converted weights by name; None if copies are not kept

    def keep_copies(self, keep: bool) -> None:
        """Keeps converted weights for later forward passes if `keep` is true, else drops the copies. Kept copies take 2
        bytes per bf16 parameter. Copies do not follow a change of weights, so keep them only while no weight changes."""
        self._copies = (self._copies or {}) if keep else None

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns the weight `name` in `dtype`, with gradient. FSDP2 itself converts sharded weights to the rows' dtype."""
        weight = self.get_parameter(name)
        if weight.dtype == dtype or self._copies is None:
            return weight.to(dtype)
        return working_copy(self._copies, name, dtype, weight)

    def _weights(self, dtype: torch.dtype, *, grouped: bool) -> dict[str, Tensor]:
        """Returns all stacked weights by name. If converted copies for grouped products are kept, gate and up are one stack
        `gate_up` [e, 2 F, D], so that one product computes both and reads x once."""
        joint = grouped and self.activation.in_row_kernels and not (self.activation.has_bias or self.adapter)
        if joint and self._copies is not None and self.gate.dtype != dtype:
            both = working_copy(self._copies, "gate_up", dtype, self.gate, self.up)
            return {"gate_up": both, "down": self.weight("down", dtype)}
        return {name: self.weight(name, dtype) for name in (*self.tensors, *self.roles)}

    def forward(
        self, x_QD: Inputs, runs: Runs, activate: Activate | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Applies each expert to its run of rows: x [Q, D] -> y [Q, D].

        Args:
            activate: Function that computes the hidden values; by default the activation alone.
            weights: `tensors` of other experts with the same sizes, instead of the stack's own.
        """
        like = x_QD[0] if isinstance(x_QD, tuple) else x_QD
        if not runs.num_experts:
            # An empty stack gets no gradient, because FSDP2's reduce-scatter refuses empty tensors but skips a parameter
            # without a gradient. FSDP2 shards a stack over ranks with the same experts, so the stack is empty on all these
            # ranks, and all of them skip it. But a shared adapter is on every rank, so its gradient must be zero, not None.
            return like + sum(0.0 * each.sum() for each in self.adapters.parameters()) if self.adapters else like
        activate = activate or self._activate
        grouped = runs.grouped(self.gemm, like, (*self.widths, *([self.adapter.rank] if self.adapter else ())))
        weights = dict(weights or self._weights(like.dtype, grouped=grouped))
        weights |= {name: runs.of_rows(weights[name]) for name in self.initial_values}
        if not grouped or not runs.num_rows:
            return self._one_by_one(x_QD, runs, weights, activate)
        inputs = inputs_between(x_QD, 0, runs.num_rows)
        return self._ffn(inputs, slice(0, runs.num_rows), weights, runs.product(like.device), activate)

    def _one_by_one(self, x_QD: Inputs, runs: Runs, weights: Mapping[str, Tensor], activate: Activate) -> Tensor:
        """Computes one expert after the other, for any dtype, device and width. Also computes experts without rows, so that
        the gradients of their weights are zero instead of None."""
        counts = list(runs.counts())
        # unbind, because the backward of an index would fill a whole weight stack with zeros for each expert
        stacks = [
            rows_between(each, 0, sum(counts)).split(counts) if name in self.initial_values else each.unbind()
            for name, each in weights.items()
        ]
        inputs = zip(*(each.split(counts) for each in inputs_between(x_QD, 0, sum(counts))), strict=True)
        rows = [slice(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)]
        y_QD = torch.cat([
            self._ffn(two, place, dict(zip(weights, one, strict=True)), F.linear, activate)
            for two, place, *one in zip(inputs, rows, *stacks, strict=True)
        ])  # fmt: skip
        padding = runs.num_rows - len(y_QD)
        return F.pad(y_QD, (0, 0, 0, padding)) if padding else y_QD

    def _ffn(
        self, inputs: Sequence[Tensor], rows: slice, weights: Mapping[str, Tensor], product: Product, activate: Activate
    ) -> Tensor:
        # gate and up are assigned to no variable, so they are freed before the next product unless autograd saves them
        if "gate_up" in weights:
            hidden_QF = activate(product(inputs[0], weights["gate_up"]), None, rows)
        else:
            both = {"gate": inputs[0], "up": inputs[1]}
            hidden_QF = activate(*self._outputs(both, "gate_up", weights, product), rows)  # pyright: ignore[reportCallIssue]
        return self._outputs({"down": hidden_QF}, "down", weights, product)[0]

    def _outputs(
        self, inputs: Mapping[str, Tensor], target: str, weights: Mapping[str, Tensor], product: Product
    ) -> Sequence[Tensor]:
        """Returns the outputs of the matrices named by the keys of `inputs`. `target` is the adapter's name for them."""
        outputs = []
        for name, x_QI in inputs.items():
            y_QO, bias_QO = product(x_QI, weights[name]), weights.get(f"{name}_bias")
            outputs.append(y_QO if bias_QO is None else y_QO + bias_QO)
        if self.adapter is None or target not in self.adapter.targets:
            return outputs
        delta_QO = self.adapter.delta(target, next(iter(inputs.values())), weights, product, self.adapters)
        return [y + delta for y, delta in zip(outputs, delta_QO.chunk(len(outputs), dim=-1), strict=True)]

    def _activate(self, gate_QF: Tensor, up_QF: Tensor | None, rows: slice) -> Tensor:
        return self.activation(*gate_and_up(gate_QF, up_QF))


class Replicas(Protocol):
    """Experts of other ranks that this rank also computes (`replicas.py`)."""

    def start(
        self, h_TD: Tensor, stacks: Callable[[str], ExpertStack]
    ) -> tuple[Tensor, Callable[[], list[tuple[int, RunStack]]]]:
        """Begins to fetch the replicas' weights. Returns the layer's input, and a function that waits for the weights. This
        function returns, for each stack, the number of slots and a function like `ExpertStack.forward`."""
        ...


class Experts(nn.Module):
    """All true (not null) experts of this rank, one `ExpertStack` per group.

    A group without experts on this rank has a stack [0, F, D]. So all ranks have the same FSDP2 units and gather these
    units in the same order. Without the empty stack, one rank's FSDP2 prefetch would run before exchanges that the other
    ranks issue first, and all ranks would hang.

    Args:
        groups: All expert groups in logical order, which is also the order of this rank's slots.
        storage: `on_host`, or `on_device` for plans of fixed sizes.
        pair_budget: Largest number of (token, expert) pairs computed at once; None for no limit. More pairs are computed in
            chunks, and backward recomputes them, so unbalanced routing costs time, not memory. `on_device` has no limit.
        kernels: Functions that gather rows, compute silu(gate) * up, and sum the outputs of pairs.

    Attributes:
        replicas: Fetches the weights of this rank's replicas in each forward; None for a layer without replicas.
    """

    replicas: Replicas | None = None

    def __init__(
        self,
        hidden_dim: int,
        groups: Sequence[ExpertGroup],
        num_local: Sequence[int],
        *,
        activation: Activation = SWIGLU,
        adapter: ExpertLoRA | None = None,
        storage: Storage = on_host,
        pair_budget: int | None = None,
        gemm: ExpertGemm = "loop",
        kernels: RowKernels = TORCH,
    ) -> None:
        super().__init__()
        self.activation, self.adapter, self.storage, self.pair_budget = activation, adapter, storage, pair_budget
        self.kernels = kernels if activation.in_row_kernels else TORCH
        self.local = tuple((group.name, count) for group, count in zip(groups, num_local, strict=True))
        for group, count in zip(groups, num_local, strict=True):
            stack = ExpertStack(hidden_dim, group.ffn_dim, count, gemm=gemm, activation=activation, adapter=adapter)
            self.add_module(group_module(group.name), stack)

    def stack(self, group: str) -> ExpertStack:
        return self.get_submodule(group_module(group))  # pyright: ignore[reportReturnType]

    def start(self, h_TD: Tensor, *, recompute: bool = False) -> tuple[Tensor, RunExperts]:
        """Begins the forward of a layer, before any row is sent. Issues the exchange of replicas' weights. Returns the
        layer's input for the dispatcher, and `forward`, which the dispatcher may call several times."""
        if self.replicas is None:
            return h_TD, partial(self, recompute=recompute)
        h_TD, arrived = self.replicas.start(h_TD, self.stack)
        return h_TD, partial(self, recompute=recompute, replicas=arrived)

    def forward(
        self,
        dispatched: DispatchedRows,
        plan: PairLayout,
        *,
        recompute: bool = False,
        replicas: Callable[[], Sequence[tuple[int, RunStack]]] = tuple,
    ) -> Tensor:
        """Returns for each dispatched row the weighted sum of its experts' outputs: [R, D] in the rows' dtype, summed in
        fp32 and rounded once. With `recompute`, backward computes the FFNs again instead of keeping their activations. The
        pairs of replicas come after the pairs of the rank's own slots."""
        rows_RD, weight_Q = dispatched.rows_RD, dispatched.weight_Q
        if self.adapter is not None and torch.is_grad_enabled() and not rows_RD.requires_grad:
            # Rows from frozen layers need no gradient, but all ranks must issue the exchange in combine's backward.
            rows_RD = rows_RD.detach().requires_grad_()
        own = [(count, self.stack(name)) for name, count in self.local]
        slots, stacks = zip(*own, *(each for each in replicas() if each[0]), strict=True)
        chunks = self.storage(dispatched, plan, slots, self.pair_budget)
        recompute = recompute or len(chunks) > 1  # the activations of all chunks would exceed the budget
        dtype = weight_Q.dtype if len(chunks) > 1 else rows_RD.dtype
        out_RD: Tensor | None = None
        for chunk in chunks:
            weights = rows_between(weight_Q, chunk.pairs.start, chunk.pairs.stop)
            run = partial(recomputed, self._weighted_sum) if recompute else self._weighted_sum
            part_RD = run(stacks, rows_RD, weights, chunk, dtype)
            # Adding saves no tensor for backward. A recomputed chunk of pairs keeps its arguments, but no activations.
            out_RD = part_RD if out_RD is None else out_RD + part_RD
        assert out_RD is not None, "there is always one chunk"
        return out_RD.to(rows_RD.dtype)  # a sum of chunks is rounded only here

    def _weighted_sum(
        self, stacks: Sequence[RunStack], rows_RD: Tensor, weight_Q: Tensor, chunk: Chunk, dtype: torch.dtype
    ) -> Tensor:
        """Computes the pairs of one chunk. Returns the sum of each row's weighted outputs, [R, D] in `dtype`."""
        index = chunk.make_index(rows_RD.shape[0])
        inputs = self.kernels.gather(rows_RD, index)  # one copy of a row per pair
        outputs, at = [], 0
        for stack, runs in zip(stacks, chunk.runs, strict=True):
            end = at + runs.num_rows
            activate = partial(self._activate, rows_between(weight_Q, at, end))
            outputs.append(stack(inputs_between(inputs, at, end), runs, activate))
            at = end
        y_QD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # a cat copies as many bytes as the gather
        return self.kernels.sum_pairs(y_QD, weight_Q, index, dtype)

    def _activate(self, weight_Q: Tensor, gate_QF: Tensor, up_QF: Tensor | None, rows: slice) -> Tensor:
        if self.activation.in_row_kernels:
            return self.kernels.swiglu(rows_between(weight_Q, rows.start, rows.stop), gate_QF, up_QF)
        return self.activation(*gate_and_up(gate_QF, up_QF))
