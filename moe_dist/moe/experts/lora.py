"""LoRA experts (arXiv 2106.09685) on one frozen FFN, as in LLaVA-MoLE. Gate, up and down use the same routing.

    W' x = W x + sum over the token's experts e of  w_e (alpha / r) B_e A_e x      for each target W of gate, up, down
    y    = W_down' (silu(W_gate' x) * W_up' x)

W is frozen. If a token chooses only null experts, y is the frozen FFN's output. Every rank has all experts, so there is no
all-to-all. A token costs one FFN, plus matrix products of rank r for each chosen expert. The weight w_e depends on p_e, the
router's probability of expert e in a softmax over all columns:

    probability         w_e = p_e
    straight_through    w_e = p_e / detach(p_e): its value is 1, and its gradient is the gradient of log p_e
    published           w_e = 1, as in the sparse branch of LLaVA-MoLE's public code (its dense branch is `probability` with
                        all experts chosen). The router then has no gradient from the task's loss

Shape letters: T tokens on this rank, D hidden size, F hidden width of the FFN, r rank, N (token, expert) pairs of the
assignments, Q taken (not absent) pairs, E experts of all groups, n experts of one group, I inputs and O outputs of a
projection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats
from moe_dist.moe.kernels.torch_kernels import gather_rows
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.draws import dropped, recomputed
from moe_dist.moe.routing.types import (
    ABSENT,
    NO_REQUEST,
    Assignments,
    GlobalBatchInfo,
    LayerReport,
    Recompute,
    Routing,
    RoutingCache,
    RoutingRequest,
)
from moe_dist.placement.parameter_names import Role, group_module
from moe_dist.placement.placement import ExpertGroup

Weight = Literal["probability", "straight_through", "published"]
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class LoRAPlan:
    """The taken (token, expert) pairs of one layer and micro-batch, sorted by expert. Recomputation reuses the plan.

    Attributes:
        pair_Q, token_Q: int64, the index of each taken pair in the assignments, and the pair's token.
        counts: Number of pairs of each expert, on the host.
    """

    pair_Q: Tensor
    token_Q: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, assignments: Assignments, num_experts: int, comm_stats: CommStats) -> "LoRAPlan":
        """Makes the plan. Costs one host sync, which reads the counts."""
        expert_N = torch.where(assignments.expert_N == ABSENT, num_experts, assignments.expert_N)
        bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
        bins.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        counts = tuple(comm_stats.to_host("LoRA pairs of each expert", bins[:num_experts]))
        pair_Q = expert_N.argsort(stable=True)[: sum(counts)]  # absent pairs come last
        return cls(pair_Q, assignments.token_N[pair_Q], counts)


def expert_weights(weight_N: Tensor, kind: Weight) -> Tensor:
    """Computes each pair's weight w_e from its probability in `weight_N`. The top of this file explains `kind`."""
    if kind == "probability":
        return weight_N
    if kind == "published":
        return torch.ones_like(weight_N)
    safe_N = torch.where(weight_N > 0, weight_N, 1.0)  # a chosen probability may underflow to 0, and 0 / 0 would be NaN
    return safe_N / safe_N.detach()


class Adapter(nn.Module):
    """The adapter of one projection. It computes B A x, where A is `a` [r, I] and B is `b` [O, r]."""

    role = Role.ADAPTER

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class LoRAStack(nn.Module):
    """The LoRA experts of one group. Each target projection has two parameters: `<target>_a` [n, r, I] has the matrices A
    of all experts, and `<target>_b` [n, O, r] the matrices B."""

    role = Role.ADAPTER

    def __init__(self, num_experts: int, widths: Mapping[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        for target, (inputs, outputs) in widths.items():
            self.register_parameter(f"{target}_a", nn.Parameter(torch.empty(num_experts, rank, inputs)))
            self.register_parameter(f"{target}_b", nn.Parameter(torch.empty(num_experts, outputs, rank)))


class LoRAExperts(nn.Module):
    """The LoRA experts of all groups, one `LoRAStack` per group.

    Args:
        hidden_dim, ffn_dim: D and F.
        rank, alpha: r, and alpha of the scale alpha / r.
        dropout: Fraction of the elements of an adapter's input that dropout sets to 0 in training.
        weight: The kind of weights w_e, which the top of this file explains.
    """

    def __init__(
        self,
        hidden_dim: int,
        ffn_dim: int,
        groups: Sequence[ExpertGroup],
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        targets: Sequence[str] = PROJECTIONS,
        weight: Weight = "probability",
    ) -> None:
        super().__init__()
        inward, outward = (hidden_dim, ffn_dim), (ffn_dim, hidden_dim)
        self._weight: Weight = weight
        self._groups, self._scale, self._dropout = tuple(groups), alpha / rank, dropout
        self._widths = {target: outward if target == "down" else inward for target in PROJECTIONS if target in targets}
        for group in groups:
            self.add_module(group_module(group.name), LoRAStack(group.num_experts, self._widths, rank))

    def forward(
        self, target: str, x_TI: Tensor, y_TO: Tensor, weight_N: Tensor, plan: LoRAPlan, *, draw: tuple[int, ...] | None
    ) -> Tensor:
        """Adds the weighted LoRA outputs of each token's experts to y, the output of the projection `target`.

        Every expert gets a gradient, which is zero if no token took the expert. For each pair, autograd keeps the input row
        and two vectors of length r. `draw` is the name of dropout's random numbers (see `adapter_draw`)."""
        if target not in self._widths:
            return y_TO
        if self.training and self._dropout:
            assert draw is not None, "dropout needs the step and the tokens' numbers, which come with the micro-batch"
            x_TI = dropped(x_TI, self._dropout, name=(*draw, PROJECTIONS.index(target)))
        weight_Q = weight_N.index_select(0, plan.pair_Q)  # instead of weight_N[pair_Q], whose backward sorts on CUDA
        weight_Q = expert_weights(weight_Q, self._weight) * self._scale  # scales r numbers per pair, not O numbers
        runs = gather_rows(x_TI, plan.token_Q).split(plan.counts)
        stacks = [self._matrices(f"{target}_{matrix}", x_TI.dtype) for matrix in "ab"]
        deltas = [
            F.linear((F.linear(run, a) * weights[:, None]).to(run.dtype), b)
            for run, weights, a, b in zip(runs, weight_Q.split(plan.counts), *stacks, strict=True)
        ]
        return y_TO.index_add(0, plan.token_Q, torch.cat(deltas))

    def _matrices(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """Returns the matrix `name` of every expert of all groups, in logical order."""
        stacks = [self.get_submodule(group_module(group.name)).get_parameter(name).to(dtype) for group in self._groups]
        # unbind, because the backward of an index would fill a whole weight stack with zeros for each expert
        return [matrix for stack in stacks for matrix in stack.unbind()]


class LoRALayer(nn.Module):
    """y = ffn'(norm(x)): the frozen FFN with the LoRA experts of each token. The caller adds the residual. This class has
    the interface of `MoELayer`, but needs no all-to-all, because every rank has all LoRA experts.

    Args:
        norm: Frozen norm of the base model.
        router: A top-k router whose weights are plain probabilities.
        ffn: Frozen FFN with `gate`, `up` and `down`.
        recompute: The part of the layer that backward computes again. `experts`: the FFN and the adapters. `block`: the
            whole layer except the choice of experts.
        seed, layer: Dropout's random numbers depend on these, and on the step and the index of the first token.
    """

    def __init__(
        self,
        *,
        norm: nn.Module,
        router: nn.Module,
        ffn: nn.Module,
        adapters: LoRAExperts,
        recompute: Recompute = "none",
        seed: int = 0,
        layer: int = 0,
        comm_stats: CommStats | None = None,
    ) -> None:
        super().__init__()
        self.norm, self.router, self.ffn, self.adapters = norm, router, ffn, adapters
        self.recompute: Recompute = recompute
        self._seed, self._layer, self._comm_stats = seed, layer, comm_stats or CommStats()

    def forward(self, x_TD: Tensor, group_T: Tensor, request: RoutingRequest = NO_REQUEST) -> tuple[Tensor, LayerReport]:
        """Returns y [T, D] and the layer's report, for x [T, D] and each token's group (int64 [T], -1 for padding)."""
        cache = RoutingCache(
            batch_info=request.batch_info, probe_tokens_A=request.probe_tokens_A, keep_choices=request.keep_choices
        )
        # Recomputes even if x_TD needs no gradient, which is so in the first LoRA layer of a frozen base model.
        if self.recompute == "block" and torch.is_grad_enabled():
            return recomputed(self._forward, x_TD, group_T, cache, request.experts_off)
        return self._forward(x_TD, group_T, cache, request.experts_off)

    def _forward(self, x_TD: Tensor, group_T: Tensor, cache: RoutingCache, experts_off: bool) -> tuple[Tensor, LayerReport]:
        h_TD = self.norm(x_TD)
        routing: Routing = self.router(h_TD, group_T, cache)
        num_experts = routing.counts.dropped_LE.shape[1]
        plan: Any = cache.plan or LoRAPlan.of(routing.assignments, num_experts, self._comm_stats)
        cache.plan = plan
        weight_N = routing.assignments.weight_N
        if self.recompute == "experts" and torch.is_grad_enabled():
            y_TD = recomputed(self._ffn, h_TD, weight_N, plan, cache.batch_info, experts_off)
        else:
            y_TD = self._ffn(h_TD, weight_N, plan, cache.batch_info, experts_off)
        sent = SentCounts(rows_remote=0, pairs=sum(plan.counts), pairs_remote=0)
        return y_TD, LayerReport(routing.counts, routing.aux, sent, prob_AC=routing.prob_AC, chosen=routing.chosen)

    def _ffn(
        self, h_TD: Tensor, weight_N: Tensor, plan: LoRAPlan, batch_info: GlobalBatchInfo | None, experts_off: bool
    ) -> Tensor:
        draw = None if batch_info is None else adapter_draw(self._seed, self._layer, batch_info)

        def projected(target: str, x_TI: Tensor) -> Tensor:
            y_TO = self.ffn.get_submodule(target)(x_TI)
            return y_TO if experts_off else self.adapters(target, x_TI, y_TO, weight_N, plan, draw=draw)

        return projected("down", F.silu(projected("gate", h_TD)) * projected("up", h_TD))


def adapter_draw(seed: int, layer: int, batch_info: GlobalBatchInfo) -> tuple[int, ...]:
    """Returns the name from which `dropped` draws a layer's random numbers for this rank's micro-batch."""
    return (seed, batch_info.step, layer, batch_info.first_token_of(batch_info.rank))
