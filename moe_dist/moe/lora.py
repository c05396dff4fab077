"""LoRA experts over one frozen FFN (LLaVA-MoLE; LoRA, arXiv 2106.09685): one route a token, shared by the projections.

    W' x = W x + sum over the token's experts e of  w_e (alpha / r) B_e A_e x      for each target W of gate, up, down
    y    = W_down' (silu(W_gate' x) * W_up' x)

W is frozen. A null choice is no expert: the FFN as it is. Every rank holds all experts, so nothing is exchanged; a token
costs one FFN and, for each expert it takes, products of rank r. Weights w_e from the probability p_e among all columns:

    probability         p_e
    straight_through    p_e / p_e without gradient: its value is 1, its gradient that of log p_e
    published           1: the task gives the router no gradient (what the paper's public code does)

Shape letters: T tokens on this rank, D hidden size, F hidden width of the FFN, r rank, N pairs of the assignments, Q pairs
that are taken, E experts over all groups, n those of a group, O a projection's outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.rows import gather_rows
from moe_dist.moe.draws import dropped
from moe_dist.moe.layer import Recompute
from moe_dist.moe.routing import ABSENT, NO_REQUEST, Assignments, GlobalBatchInfo, LayerReport, RoutingCache, RoutingRequest
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.roles import Role, group_module

Weight = Literal["probability", "straight_through", "published"]
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class LoRAPlan:
    """The taken pairs, sorted by expert: made once a layer and micro-batch, and kept for its recomputation.

    Attributes:
        pair_Q, token_Q: int64, each pair's place among the N, and its token.
        counts: Pairs of each expert, on the host.
    """

    pair_Q: Tensor
    token_Q: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, assignments: Assignments, num_experts: int, comm_stats: CommStats) -> "LoRAPlan":
        """Syncs with the host once, for the counts."""
        expert_N = torch.where(assignments.expert_N == ABSENT, num_experts, assignments.expert_N)
        bins = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
        bins.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        counts = tuple(comm_stats.to_host("LoRA pairs of each expert", bins[:num_experts]))
        pair_Q = expert_N.argsort(stable=True)[: sum(counts)]
        return cls(pair_Q, assignments.token_N[pair_Q], counts)


def expert_weights(weight_N: Tensor, kind: Weight) -> Tensor:
    """Weights of taken pairs from their probabilities, see the top of this file."""
    if kind == "probability":
        return weight_N
    if kind == "published":
        return torch.ones_like(weight_N)
    safe_N = torch.where(weight_N > 0, weight_N, 1.0)  # a chosen probability may underflow; 0 / 0 must not be met
    return safe_N / safe_N.detach()


class LoRAStack(nn.Module):
    """The experts of one group: for each target A [n, r, in] as `<target>_a` and B [n, out, r] as `<target>_b`."""

    role = Role.ADAPTER

    def __init__(self, num_experts: int, widths: Mapping[str, tuple[int, int]], rank: int) -> None:
        super().__init__()
        for target, (inputs, outputs) in widths.items():
            self.register_parameter(f"{target}_a", nn.Parameter(torch.empty(num_experts, rank, inputs)))
            self.register_parameter(f"{target}_b", nn.Parameter(torch.empty(num_experts, outputs, rank)))


class LoRAExperts(nn.Module):
    """The LoRA experts of all groups, one stack for each.

    Args:
        hidden_dim, ffn_dim: D, F.
        groups: All groups in logical order.
        rank, alpha: r, and the numerator of the scale.
        dropout: Share of an adapter's inputs that is dropped while training.
        targets: Projections that have adapters.
        weight: How a chosen expert is weighted.
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
        """y + each token's weighted adapters of one projection, in y's dtype; y itself where it has none.

        Every expert has a gradient, zero where no token took it. What autograd keeps of a pair: its input and two vectors
        of r; the sum over a token's experts keeps their indices alone.

        Args:
            draw: Names the draws of the dropout, see `adapter_draw`.
        """
        if target not in self._widths:
            return y_TO
        if self.training and self._dropout:
            assert draw is not None, "dropout needs the step and the tokens' numbers, which come with the micro-batch"
            x_TI = dropped(x_TI, self._dropout, name=(*draw, PROJECTIONS.index(target)))
        weight_Q = expert_weights(weight_N[plan.pair_Q], self._weight) * self._scale
        runs = gather_rows(x_TI, plan.token_Q).split(plan.counts)
        stacks = [self._matrices(f"{target}_{matrix}", x_TI.dtype) for matrix in "ab"]
        deltas = [
            F.linear((F.linear(run, a) * weights[:, None]).to(run.dtype), b)
            for run, weights, a, b in zip(runs, weight_Q.split(plan.counts), *stacks, strict=True)
        ]
        return y_TO.index_add(0, plan.token_Q, torch.cat(deltas))

    def _matrices(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """One matrix of each expert of all groups, in logical order."""
        stacks = [self.get_submodule(group_module(group.name)).get_parameter(name).to(dtype) for group in self._groups]
        # unbind, not indexing: the backward of an index would fill a whole stack with zeros for each expert.
        return [matrix for stack in stacks for matrix in stack.unbind()]


class LoRALayer(nn.Module):
    """y = ffn'(norm(x)), the frozen FFN with each token's LoRA experts; the caller adds the residual. A drop-in
    replacement for `MoELayer` that returns the same `LayerReport`. It needs no all-to-all: every rank holds all LoRA
    experts.

    Args:
        norm: Of the base, frozen.
        router: Top-k, whose weights are plain probabilities.
        ffn: With `gate`, `up` and `down`, frozen.
        adapters: The experts.
        recompute: `experts` computes the FFN and the adapters again in backward, `block` the whole layer but the routing.
        seed, layer: Name the dropout's draws, with the step and the tokens.
        comm_stats: Where host syncs are noted.
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
        """x [T, D] and the tokens' groups (int64, -1 for padding) -> y [T, D] and the layer's report."""
        cache = RoutingCache(batch_info=request.batch_info, probe_tokens_A=request.probe_tokens_A)
        # Not x_TD.requires_grad, as elsewhere: below the first adapter nothing has a gradient.
        if self.recompute == "block" and torch.is_grad_enabled():
            return self._again(self._forward, x_TD, group_T, cache, request.experts_off)
        return self._forward(x_TD, group_T, cache, request.experts_off)

    def _forward(self, x_TD: Tensor, group_T: Tensor, cache: RoutingCache, experts_off: bool) -> tuple[Tensor, LayerReport]:
        h_TD = self.norm(x_TD)
        assignments, sums, _, prob_AC = self.router(h_TD, group_T, cache)
        plan: Any = cache.plan or LoRAPlan.of(assignments, len(sums.dropped_E), self._comm_stats)
        cache.plan = plan
        weight_N = assignments.weight_N
        if self.recompute == "experts" and torch.is_grad_enabled():
            y_TD = self._again(self._ffn, h_TD, weight_N, plan, cache.batch_info, experts_off)
        else:
            y_TD = self._ffn(h_TD, weight_N, plan, cache.batch_info, experts_off)
        return y_TD, LayerReport(sums, rows_remote=0, pairs=sum(plan.counts), pairs_remote=0, prob_AC=prob_AC)

    def _ffn(
        self, h_TD: Tensor, weight_N: Tensor, plan: LoRAPlan, batch_info: GlobalBatchInfo | None, experts_off: bool
    ) -> Tensor:
        draw = None if batch_info is None else adapter_draw(self._seed, self._layer, batch_info)

        def projected(target: str, x_TI: Tensor) -> Tensor:
            y_TO = self.ffn.get_submodule(target)(x_TI)
            return y_TO if experts_off else self.adapters(target, x_TI, y_TO, weight_N, plan, draw=draw)

        return projected("down", F.silu(projected("gate", h_TD)) * projected("up", h_TD))

    @staticmethod
    def _again(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def adapter_draw(seed: int, layer: int, batch_info: GlobalBatchInfo) -> tuple[int, ...]:
    """The name of a layer's draws in this micro-batch on this rank."""
    return (seed, batch_info.step, layer, batch_info.first_token_of(batch_info.rank))
