"""Lists the possible layouts of a configuration on a given number of GPUs. Imports no torch."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.config.dispatchers.kinds import (
    AllToAllDispatchSection,
    HierarchicalDispatchSection,
    KnownCountsDispatchSection,
)
from moe_dist.config.parallel.section import ExplicitSection, InterleavedSection, PinnedSection, PlacementSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.rates import GUIDE, Rates
from moe_dist.plan.rows import crossing_groups


def gpu_counts(low: int, high: int) -> list[int]:
    """Returns the numbers of GPUs to plan for: `low`, its doublings up to `high`, and `high`."""
    if low < 1:
        given = str(low) if low == high else f"{low}..{high}"
        raise ConfigError(f"--gpus {given}: must be 1 or more; write a number (8) or a range (8..64)", see=GUIDE)
    if low > high:
        raise ConfigError(
            f"--gpus {low}..{high}: the range is empty; write the smaller number first, as in 8..64", see=GUIDE
        )
    return sorted({high, *(low << i for i in range((high // low).bit_length()))})


def layouts(config: Config, gpus: int, rates: Rates, placements: "Placements") -> Iterator[tuple[Config, ExpertPlacement]]:
    """Yields the layouts on `gpus` GPUs that the configuration's rules may allow."""
    experts = sum(group.num_experts for group in expert_groups(config.model.moe))
    sizes = [1] if config.model.moe.experts.replicated else [n for n in range(1, min(gpus, experts) + 1) if gpus % n == 0]
    per_rank = config.train.global_batch // gpus
    micro = [n for n in (1, 2, 4, 8, 16, 32) if config.train.global_batch % (n * gpus) == 0 and n <= per_rank]
    recomputes = ("none", "experts", "block") if config.model.mixture_of_depths is None else ("none", "experts")
    gathers = [("ddp", "micro_batch"), *([("fsdp2", "micro_batch"), ("fsdp2", "step")] if gpus > 1 else [])]
    for ep in sizes:
        for section, placement in placements.of(ep):
            for dispatch in _dispatchers(config, ep, gpus // ep, rates):
                for recompute in recomputes:
                    for data, gather in gathers:
                        parallel = config.parallel.model_copy(
                            update={
                                "ep": ep,
                                "edp": gpus // ep,
                                "data": data,
                                "fsdp_gather": gather,
                                "recompute": recompute,
                                "dispatch": dispatch,
                                # two_batch_overlap works only with all_to_all, and the planner does not model its time
                                "two_batch_overlap": False,
                            }
                        )
                        for size in micro:
                            train = config.train.model_copy(update={"micro_batch": size})
                            changes = {"parallel": parallel, "placement": section, "train": train}
                            yield config.model_copy(update=changes), placement


def _dispatchers(config: Config, ep: int, edp: int, rates: Rates) -> list[DispatchSection]:
    if ep == 1:
        return [AllToAllDispatchSection()]
    found: list[DispatchSection] = [
        AllToAllDispatchSection(overlap=overlap, chunks=chunks) for overlap in (False, True) for chunks in (1, 2, 4)
    ]
    once = math.gcd(ep, rates.ranks_per_node)  # so many consecutive ranks are on one node in every EP group
    if once > 1 and crossing_groups(ep, edp, rates.ranks_per_node):
        found.append(HierarchicalDispatchSection(ranks_per_node=once))
    if not config.model.moe.router.counts_unknown():
        found.append(KnownCountsDispatchSection())
    return found


class Placements:
    """The placements for each EP size: interleaved, pinned (if there are several groups), and one for measured loads. Each
    is made once. `solved` maps an EP size to the slots for measured loads; it is None without a trace."""

    def __init__(self, config: Config, token_mix: Mapping[str, int], solved: Any = None) -> None:
        self._config, self._mix, self._solved = config, token_mix, solved
        self._made: dict[int, list[tuple[PlacementSection, ExpertPlacement]]] = {}

    def of(self, ep: int) -> list[tuple[PlacementSection, ExpertPlacement]]:
        """Returns, for an EP size, pairs of a section `placement` and the placement that is made from it."""
        if ep not in self._made:
            self._made[ep] = list(self._make(ep))
        return self._made[ep]

    def _make(self, ep: int) -> Iterator[tuple[PlacementSection, ExpertPlacement]]:
        groups = expert_groups(self._config.model.moe)
        sections: list[PlacementSection] = [InterleavedSection()]
        if len(groups) > 1 and ep > 1:
            given = self._config.placement
            fits = isinstance(given, PinnedSection) and ep == self._config.parallel.ep
            sections.append(given if fits else PinnedSection())
        if self._solved is not None and ep > 1:
            named = ExpertPlacement.interleaved(groups, 1)
            slots = tuple(tuple(named.name_of(expert) for expert in rank) for rank in self._solved(ep))
            sections.append(ExplicitSection(slots=slots))
        for section in sections:
            try:
                yield section, make_placement(section, groups, num_ranks=ep, token_mix=self._mix)
            except ConfigError:
                continue  # a pinned placement is impossible if there are fewer ranks than groups
