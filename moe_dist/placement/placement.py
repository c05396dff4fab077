"""Maps the slots of each rank to experts. A slot is a position on a rank that contains the weights of one expert.

An expert's logical id is its index among the experts of all groups, in group order: group g has the ids first_g .. first_g
+ n_g - 1. In this file, a rank is a position in an EP group. Ranks may have different numbers of slots, or none. Every
layer uses the same map of slots to experts.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import comb
from typing import Any

import numpy as np

from moe_dist.errors import ConfigError

NAMED = 10  # largest number of experts that a message names


@dataclass(frozen=True)
class ExpertGroup:
    """One group of experts.

    Attributes:
        name: Name of the group, which is part of the experts' logical names.
        num_experts: Number of true (not null) experts (n). Only true experts have slots on ranks.
        num_null: Number of null experts (m).
        top_k: Number of choices per token (k).
        ffn_dim: Hidden width of each expert (F).
        first_expert: Logical id of the group's first true expert.
        modalities: Modalities whose tokens choose among the group's experts.
        num_identity, num_constant: Numbers of identity and constant experts, which every rank computes for its own tokens.
        token_share: In expert choice, the fraction c of the group's tokens that each expert takes. With an adaptive router
            and a target, the mean of this fraction over experts. None if each token has top_k choices.
        node_groups: Number of node groups into which the true experts are divided, in consecutive blocks.
        topk_node_groups: Largest number of node groups from which one token may choose experts.
    """

    name: str
    num_experts: int
    num_null: int
    top_k: int
    ffn_dim: int
    first_expert: int = 0
    modalities: tuple[str, ...] = ()
    num_identity: int = 0
    num_constant: int = 0
    token_share: float | None = None
    node_groups: int = 1
    topk_node_groups: int = 1

    @property
    def experts(self) -> range:
        """Returns the logical ids of the group's true experts."""
        return range(self.first_expert, self.first_expert + self.num_experts)

    @property
    def num_columns(self) -> int:
        """Returns the number of columns among which a token of the group chooses. Each expert of any kind is one column."""
        return self.num_experts + self.num_null + self.num_identity + self.num_constant

    @property
    def expected_experts_per_token(self) -> float:
        """Returns the mean number of true experts per token under uniform routing: k n / columns, in expert choice c n."""
        if self.token_share is not None:
            return min(1.0, self.token_share) * self.num_experts
        return self.top_k * self.num_experts / self.num_columns

    def reached(self, here: int) -> float:
        """Returns the probability, under uniform routing, that a token of the group chooses any of `here` experts."""
        if self.token_share is not None:
            return 1 - (1 - min(1.0, self.token_share)) ** here
        return 1 - comb(self.num_columns - here, self.top_k) / comb(self.num_columns, self.top_k)


def group_shares(groups: Sequence[ExpertGroup], token_mix: Mapping[str, int]) -> list[float]:
    """Returns each group's fraction of all tokens. If the mix has no tokens, all modalities get equally many."""
    mix = token_mix if any(token_mix.values()) else {m: 1 for group in groups for m in group.modalities}
    tokens = [sum(mix.get(modality, 0) for modality in group.modalities) for group in groups]
    return [count / max(1, sum(tokens)) for count in tokens]


@dataclass(frozen=True)
class ExpertPlacement:
    """The logical ids of the experts in the slots of each rank of an EP group. The slots of a rank are sorted by logical
    id, so that the experts of a group are in consecutive slots. Raises ConfigError if an expert has no slot or several
    slots, or if the slots of a rank are not sorted."""

    groups: tuple[ExpertGroup, ...]
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        placed = sorted(expert for slots in self.slots for expert in slots)
        count = self.num_experts  # a damaged file may have any number
        if len(placed) != count or placed != list(range(count)):
            slots = Counter(placed)
            missing = [self.name_of(e) for e in itertools.islice((e for e in range(count) if e not in slots), NAMED)]
            twice = [
                self.name_of(e) for e in itertools.islice((e for e in slots if slots[e] > 1 and 0 <= e < count), NAMED)
            ]
            raise ConfigError(
                f"placement: each expert must have exactly one slot; without one: {missing or 'none'}, "
                f"with several: {twice or 'none'}; each of several groups needs its own `first_expert`"
            )
        if any(tuple(sorted(slots)) != slots for slots in self.slots):
            raise ConfigError("placement: the slots of a rank must be sorted by logical expert id")

    @classmethod
    def interleaved(cls, groups: Sequence[ExpertGroup], num_ranks: int) -> "ExpertPlacement":
        """Spreads the experts of every group evenly over all ranks. If a group's number of experts is not a multiple of the
        number of ranks, some ranks get one more expert. To keep ranks balanced, the next group's extra experts go to the
        ranks that follow the last rank with an extra expert."""
        slots: list[list[int]] = [[] for _ in range(num_ranks)]
        offset = 0
        for group in groups:
            for part, experts in enumerate(even_runs(group.experts, num_ranks)):
                slots[(offset + part) % num_ranks].extend(experts)
            offset += group.num_experts  # the next group starts at the rank where this group ended
        return cls(tuple(groups), tuple(map(tuple, slots)))

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def num_experts(self) -> int:
        """Returns the number of true experts of all groups (E)."""
        return sum(group.num_experts for group in self.groups)

    @cached_property  # cached, because the dispatch plan of each layer reads it
    def rank_of_expert(self) -> tuple[int, ...]:
        """Returns the rank (EP position) of each logical expert."""
        return tuple(rank for _, rank, _ in self._places())

    @cached_property
    def slot_of_expert(self) -> tuple[int, ...]:
        """Returns the slot of each logical expert on its rank."""
        return tuple(slot for _, _, slot in self._places())

    @cached_property
    def width_of_expert(self) -> tuple[int, ...]:
        """Returns the hidden width of each logical expert."""
        return tuple(group.ffn_dim for group in self.groups for _ in group.experts)

    def local_experts(self, rank: int, group: ExpertGroup) -> tuple[int, ...]:
        """Returns the logical ids of the group's experts on `rank`, in slot order."""
        return tuple(expert for expert in self.slots[rank] if expert in group.experts)

    def by_rank(self, pairs_LE: np.ndarray) -> np.ndarray:
        """Sums a count per layer and expert [L, E] over the experts that each rank computes: [L, R]."""
        rank_E = np.array(self.rank_of_expert)
        return np.stack([pairs_LE[:, rank_E == rank].sum(1) for rank in range(self.num_ranks)], axis=1)

    def computing_ranks(self, layer: int) -> np.ndarray:
        """Returns for each source rank and expert the rank that computes the expert, int64 [R, E]; equal in all layers."""
        return np.tile(np.array(self.rank_of_expert), (self.num_ranks, 1))

    @property
    def line(self) -> dict[str, Any]:
        """Returns the slots in the form in which a line of metrics.jsonl contains them."""
        return {"slots": [[*each] for each in self.slots]}

    def most_rows(self, rank: int, group: ExpertGroup) -> int:
        """Returns the largest number of other ranks on which a token of `rank` can have experts in one layer. In token
        choice it is at most top_k, and always at most the number of ranks with the node groups that the token may use."""
        away = [
            {self.rank_of_expert[expert] for expert in part} - {rank}
            for part in even_runs(group.experts, group.node_groups)
        ]
        largest = sorted(map(len, away), reverse=True)[: group.topk_node_groups]
        choices = group.top_k if group.token_share is None else group.num_experts
        return min(sum(largest), len(set().union(*away)), choices)

    def name_of(self, expert: int) -> str:
        """Returns an expert's name 'group/index', for messages and logical names."""
        for group in self.groups:
            if expert in group.experts:
                return f"{group.name}/{expert - group.first_expert}"
        return f"expert {expert} (of {self.num_experts})"

    def _places(self) -> list[tuple[int, int, int]]:
        """Returns (expert, rank, slot) of every expert, in the order of logical ids."""
        return sorted((expert, rank, slot) for rank, slots in enumerate(self.slots) for slot, expert in enumerate(slots))


def even_runs(experts: range, parts: int) -> list[range]:
    """Divides a range into consecutive blocks whose lengths differ by at most one, longer blocks first."""
    short, longer = divmod(len(experts), parts)
    edges = [part * short + min(part, longer) for part in range(parts + 1)]
    return [experts[a:b] for a, b in itertools.pairwise(edges)]
