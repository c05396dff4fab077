"""The true experts on this rank: SwiGLU FFNs, stacked by group, run over rows sorted by slot.

Shape letters: Q pairs computed here, R rows, D hidden size, F hidden width of a group's experts, e a group's experts here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.dispatch.rows import gather_rows, weighted_row_sum
from moe_dist.moe.expert_gemm import ExpertGemm, choose_gemm
from moe_dist.placement.placement import ExpertGroup
from moe_dist.placement.roles import Role, group_module


class ExpertStack(nn.Module):
    """Experts of one group on this rank: `gate`, `up` [e, F, D] and `down` [e, D, F].

    `gemm` is how their products are computed, see `moe_dist.moe.expert_gemm`.
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
        gemm: How the products are computed, see `moe_dist.moe.expert_gemm`.
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
