"""Estimates the memory of a rank, by the engine's function, from the expected rows of its placement. Imports no torch."""

from collections.abc import Mapping

from moe_dist.config.base.section import named
from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement, group_shares
from moe_dist.plan import memory
from moe_dist.plan.planner import PlacementCosts, expected_plan


def fullest_rank(
    config: Config, placement: ExpertPlacement, token_mix: Mapping[str, int]
) -> tuple[int, memory.RankMemory, PlacementCosts]:
    """Returns the position in an EP group that needs most memory, its memory, and the plan of `placement`."""
    plan = expected_plan(placement, token_mix, name=config.placement.policy)
    memories = [_expected(config, placement, plan, rank, token_mix) for rank in range(placement.num_ranks)]
    rank = max(range(placement.num_ranks), key=lambda r: memories[r].total)
    return rank, memories[rank], plan


def _expected(
    config: Config, placement: ExpertPlacement, plan: PlacementCosts, rank: int, token_mix: Mapping[str, int]
) -> memory.RankMemory:
    """Returns the memory of the EP rank `rank`. `plan` has rows per token of the whole EP group, which this function
    converts to rows and (token, expert) pairs per token of each rank."""
    ranks, groups = placement.num_ranks, placement.groups
    shares = group_shares(groups, token_mix)
    held = [len(placement.local_experts(rank, group)) / group.num_experts for group in groups]
    chosen = [group.expected_experts_per_token for group in groups]
    pairs = ranks * sum(share * own * number for share, own, number in zip(shares, held, chosen, strict=True))
    rows = plan.remote_R[rank] * ranks * ranks / (ranks - 1) if ranks > 1 else min(1.0, pairs)
    return named(config.engine.memory)(config, placement, rank=rank, rows=rows, pairs=pairs)
