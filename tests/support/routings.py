"""Random and hand-made routings for dispatchers, and a round trip that compares any dispatcher with the oracle.

Between dispatch and combine the 'experts' multiply a row by their id + 1, so the oracle is one line.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

D = 3


@dataclass(frozen=True)
class Case:
    """One routing: the experts on each rank, and the experts that its tokens choose (ABSENT for a null choice)."""

    slots: tuple[tuple[int, ...], ...]
    experts_TK: tuple[np.ndarray, ...]

    @property
    def placement(self) -> ExpertPlacement:
        num_experts = sum(len(slots) for slots in self.slots)
        return ExpertPlacement((ExpertGroup("all", num_experts, 0, 1, 4, 0, ("text",)),), self.slots)

    def assignments(self, rank: int, weight_N: torch.Tensor) -> Assignments:
        """Returns one rank's assignments. Pairs are sorted by token, as in token choice."""
        chosen = torch.from_numpy(self.experts_TK[rank])
        return Assignments(torch.arange(chosen.shape[0]).repeat_interleave(chosen.shape[1]), chosen.flatten(), weight_N)

    def taken(self, rank: int) -> tuple[list[int], list[int]]:
        """Returns the token and the expert of each pair that one rank takes."""
        chosen = self.experts_TK[rank]
        tokens, columns = np.nonzero(chosen != ABSENT)
        return tokens.tolist(), chosen[tokens, columns].tolist()


def random_case(seed: int, world_size: int) -> Case:
    """Draws uneven placements and token counts, some ranks without experts or tokens, and any share of null choices."""
    rng = np.random.default_rng([seed, world_size])
    num_experts = int(rng.integers(1, 9))
    rank_of = rng.integers(0, world_size, num_experts)
    slots = tuple(tuple(np.flatnonzero(rank_of == rank).tolist()) for rank in range(world_size))
    kind = ("any", "all null", "one expert", "first half")[int(rng.integers(0, 4)) if seed % 3 == 0 else 0]
    rows = []
    for _ in range(world_size):
        tokens, top_k = int(rng.integers(0, 12)) if rng.random() < 0.8 else 0, int(rng.integers(1, num_experts + 1))
        pool = num_experts // 2 + 1 if kind == "first half" else num_experts
        chosen = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)], dtype=np.int64)
        chosen = chosen.reshape(tokens, top_k)
        chosen[(rng.random(chosen.shape) < rng.random()) | (chosen >= pool)] = ABSENT
        if kind == "all null":
            chosen[:] = ABSENT
        elif kind == "one expert":
            chosen[:] = ABSENT
            chosen[:, :1] = 0
        rows.append(chosen)
    return Case(slots, tuple(rows))


@dataclass(frozen=True)
class RoundTrip:
    """The results of a round trip: its plan, and the payload bytes of forward and of both passes."""

    plan: Any
    forward_bytes: int
    total_bytes: int


def round_trip(
    dispatcher: Any, assignments: Assignments, placement: ExpertPlacement, rank: int, num_tokens: int, *,
    comm_stats: CommStats, seed: int, dtype: torch.dtype = torch.double, tolerance: float = 1e-12,
) -> RoundTrip:  # fmt: skip
    """Dispatches and combines assignments, and compares values and gradients with the oracle.

    The weights of pairs are random (float64 in a float64 run, otherwise fp32). Absent pairs have weight zero.
    """
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    weights_dtype = torch.promote_types(dtype, torch.float32)
    h_TD = torch.randn(num_tokens, D, dtype=torch.double, generator=generator).to(dtype).requires_grad_()
    weight_N = torch.rand(assignments.token_N.shape[0], dtype=torch.double, generator=generator).to(weights_dtype)
    weight_N.requires_grad_()
    comm_stats.take()
    if comm_stats.events is not None:
        comm_stats.events.clear()
    plan = dispatcher.plan(assignments._replace(weight_N=weight_N), num_tokens)

    def experts(dispatched: DispatchedRows, layout: PairLayout) -> torch.Tensor:
        ids = torch.tensor(placement.slots[rank], dtype=weights_dtype) + 1
        factor_Q = ids.repeat_interleave(torch.tensor(layout.slot_counts, dtype=torch.int64))
        pairs_QD = dispatched.rows_RD[layout.row_of_pair_Q].to(weights_dtype) * (dispatched.weight_Q * factor_Q)[:, None]
        summed_RD = torch.zeros(dispatched.rows_RD.shape, dtype=weights_dtype)
        return summed_RD.index_add(0, layout.row_of_pair_Q, pairs_QD).to(dtype)

    y_TD, _ = dispatcher.run(h_TD, weight_N, plan, experts=experts)
    forward_bytes = comm_stats.payload_bytes

    taken = assignments._replace(weight_N=weight_N).taken()
    scale_T = torch.zeros(num_tokens, dtype=weights_dtype)
    scale_T = scale_T.index_add(0, taken.token_N, taken.weight_N * (taken.expert_N + 1))
    expected = h_TD * scale_T[:, None]
    torch.testing.assert_close(y_TD, expected.to(dtype), rtol=0, atol=tolerance)
    direction = torch.randn(y_TD.shape, dtype=torch.double, generator=generator).to(dtype)
    theirs = torch.autograd.grad((expected * direction).sum(), [h_TD, weight_N])
    ours = torch.autograd.grad((y_TD * direction).sum(), [h_TD, weight_N])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    return RoundTrip(plan, forward_bytes, comm_stats.payload_bytes)
