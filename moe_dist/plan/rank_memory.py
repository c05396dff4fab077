"""Estimates a rank's memory from the expected rows of its placement, with the engine's function. Imports no torch."""

from collections.abc import Mapping

from moe_dist.config.base.section import named
from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan import memory
from moe_dist.plan.planner import PlacementCosts, expected_plan
from moe_dist.plan.rows import Expected, Wire


def fullest_rank(
    config: Config, placement: ExpertPlacement, token_mix: Mapping[str, int]
) -> tuple[int, memory.RankMemory, PlacementCosts]:
    """Returns the position in an EP group that needs the most memory, its memory, and the costs of `placement`."""
    ranks, estimate = placement.num_ranks, named(config.engine.memory)
    load = Expected(token_mix).load(placement, Wire(ranks), tokens=1, layers=1)
    memories: list[memory.RankMemory] = []
    for rank, (rows, pairs) in enumerate(zip(load.rows[0, 0].tolist(), load.pairs[0, 0].tolist(), strict=True)):
        rows = rows if ranks > 1 else min(1.0, pairs)
        memories.append(estimate(config, placement, rank=rank, rows=rows, pairs=pairs))
    rank = max(range(ranks), key=lambda r: memories[r].total)
    return rank, memories[rank], expected_plan(placement, token_mix, name=config.placement.policy)
