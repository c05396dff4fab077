"""Counts the token rows that dispatch would send with other placements of the experts but the same expert choices.

Shape letters: T tokens, K choices, E true experts, P placements.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import PLACEMENT_ROWS
from moe_dist.comm.tracker import CollectiveTracker
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch
from moe_dist.moe.routing.types import LayerReport
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.preflight import Preflight
from moe_dist.train.step.tracing import StepWatcher


class PlacementRows(StepWatcher):
    """Counts token rows from step `first` (0-based) on: one row for each rank to which a forward pass sends a token. If
    experts move, the counted placements stay the same.

    Args:
        placements: Maps names to placements. All placements must have the same expert groups.
        ep_rank: Position of this rank in its EP group.
    """

    own_tokens = True  # the rank that routes a token counts it

    def __init__(
        self, placements: Mapping[str, ExpertPlacement], *, ep_rank: int, first: int, device: torch.device
    ) -> None:
        self._names, self._ep_rank, self._first = tuple(placements), ep_rank, first
        self._ranks = next(iter(placements.values())).num_ranks
        tables = [torch.tensor(placement.rank_of_expert) for placement in placements.values()]
        self._rank_PE = torch.stack(tables).to(device)
        self._rows_P = torch.zeros(len(tables), dtype=torch.int64, device=device)

    def due(self, number: int) -> bool:
        return number >= self._first

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        """Counts the token rows of a micro-batch on the device, without a host sync."""
        for report in reports:
            if report.chosen is not None:
                self._rows_P += remote_rows(report.chosen.column_TK, self._rank_PE, self._ranks, self._ep_rank)

    def total(self, world: dist.ProcessGroup | None, tracker: CollectiveTracker | None) -> dict[str, int]:
        """Returns, for each placement, the number of rows that all ranks send. Collective."""
        rows_P = sum_over(self._rows_P.clone(), world, name=PLACEMENT_ROWS, tracker=tracker)
        return dict(zip(self._names, rows_P.tolist(), strict=True))


def build_placement_rows(config: Config, plan: Preflight, mesh: Mesh, *, last: int) -> PlacementRows | None:
    """Makes the counter of the token rows in the run's last `last` steps. It counts for this run's placement and for the
    placements that `plan` compares. Returns None without `monitor.cost_table`."""
    if not config.monitor.cost_table:
        return None
    own = config.placement.policy
    others = {each.name: each.placement for each in plan.comparison.plans if each.name != own}
    placements = {own: plan.placement} | {name: each for name, each in others.items() if each.slots != plan.placement.slots}
    first = max(0, config.train.steps - last)
    return PlacementRows(placements, ep_rank=mesh.ep_rank, first=first, device=mesh.device)


def remote_rows(column_TK: Tensor, rank_PE: Tensor, num_ranks: int, ep_rank: int) -> Tensor:
    """Returns the number of distinct pairs (token, other rank) under each placement, int64 [P]. Columns from E on (null
    experts) and negative columns (no choice, or a dropped pair) need no row."""
    column_TK = column_TK.to(torch.int64)
    taken_TK = (column_TK >= 0) & (column_TK < rank_PE.shape[1])
    rank_PTK = rank_PE[:, torch.where(taken_TK, column_TK, 0)]
    rank_PTK = torch.where(taken_TK, rank_PTK, ep_rank)  # on the token's own rank, so no row
    reached_PTR = torch.zeros(*rank_PTK.shape[:2], num_ranks, dtype=torch.bool, device=column_TK.device)
    reached_PTR.scatter_(2, rank_PTK, True)
    reached_PTR[:, :, ep_rank] = False
    return reached_PTR.sum((1, 2))
