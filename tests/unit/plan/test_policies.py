"""Tests placement policies on cases that were computed by hand, and their properties on random cases."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.config.model_schema import MoESection
from moe_dist.config.parallel.section import ExplicitSection, InterleavedSection, PinnedSection
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import expert_groups, group_load, make_placement


def groups(*sizes: int, ffn_dim: int = 8) -> tuple[ExpertGroup, ...]:
    """Returns groups a, b, ... of these sizes, with one choice each."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    names = "abcdefgh"
    return tuple(ExpertGroup(names[i], n, 0, 1, ffn_dim, firsts[i], (names[i],)) for i, n in enumerate(sizes))


def pinned(**ranks: tuple[int, ...]) -> PinnedSection:
    return PinnedSection.model_validate({"groups": {name: {"ranks": each} for name, each in ranks.items()}})


def place(section: Any, of: tuple[ExpertGroup, ...], ranks: int, **mix: int) -> tuple[tuple[int, ...], ...]:
    return make_placement(section, of, num_ranks=ranks, token_mix=mix).slots


def test_groups_of_a_configuration() -> None:
    text = {"num_experts": 3, "num_null": 1, "top_k": 2, "ffn_dim": 16, "modalities": ("text", "code")}
    image = {"num_experts": 2, "top_k": 1, "ffn_dim": 24}
    moe = MoESection.model_validate({"groups": {"words": text, "image": image}})
    assert expert_groups(moe) == (
        ExpertGroup("words", 3, 1, 2, 16, 0, ("text", "code")),
        ExpertGroup("image", 2, 0, 1, 24, 3, ("image",)),
    )


@pytest.mark.parametrize(
    ("section", "sizes", "mix", "slots"),
    [
        # a has 5 experts on 4 ranks, so rank 0 gets two. b has 3 experts, which start at rank 1, after a's last expert
        (InterleavedSection(), (5, 3), {}, ((0, 1), (2, 5), (3, 6), (4, 7))),
        (InterleavedSection(), (2, 1), {}, ((0,), (1,), (2,), ())),
        (pinned(a=(2, 0), b=(1, 3)), (5, 3), {}, ((3, 4), (5, 6), (0, 1, 2), (7,))),
        (pinned(a=(0, 1, 2), b=(3,)), (2, 1), {}, ((0,), (1,), (), (2,), ())),
        (PinnedSection(), (4, 4), {"a": 300, "b": 100}, ((0, 1), (2,), (3,), (4, 5, 6, 7))),  # 3 ranks and 1, as 300 : 100
        (PinnedSection(), (4, 4), {"a": 100, "b": 100}, ((0, 1), (2, 3), (4, 5), (6, 7))),
        (
            PinnedSection(),
            (4, 4),
            {"a": 1, "b": 999},
            ((0, 1, 2, 3), (4, 5), (6,), (7,)),
        ),  # each group gets at least one rank
        (PinnedSection(), (4, 4), {}, ((0, 1), (2, 3), (4, 5), (6, 7))),  # if no mix is given, all groups count equally
        (pinned(b=(1,)), (3, 2, 1), {"a": 100, "b": 1, "c": 1}, ((0, 1), (3, 4), (2,), (5,))),
        (PinnedSection(), (1, 2), {"a": 1000, "b": 1}, ((0,), (1,), (2,), (), (), ())),  # at most one rank per expert
        (ExplicitSection(slots=(("b/0", "a/1"), (), ("a/0", "a/2"))), (3, 1), {}, ((1, 3), (), (0, 2))),
    ],
)
def test_placements_by_hand(
    section: Any, sizes: tuple[int, ...], mix: dict[str, int], slots: tuple[tuple[int, ...], ...]
) -> None:
    assert place(section, groups(*sizes), len(slots), **mix) == slots


def test_load_counts_experts_and_width() -> None:
    wide = ExpertGroup("a", 8, 8, 4, 100, 0, ("x", "y"))
    assert group_load(wide, {"x": 10, "y": 5, "z": 99}) == 15 * 2.0 * 100


@pytest.mark.parametrize(
    ("section", "problems"),
    [
        (pinned(a=(4, 0), b=(1,)), ["placement.groups.a.ranks=[4, 0]: [4] out of range; take ranks below parallel.ep=4"]),
        (pinned(a=(0, 1), b=(1, 2)), ["placement.groups.b.ranks=[1, 2]: [1] already hold group 'a'"]),
        (pinned(a=(0, 0), b=(1,)), ["placement.groups.a.ranks=[0, 0]: a rank is listed twice"]),
        (pinned(aa=(0,)), ["placement.groups.aa: no such group; there are a, b; did you mean 'a'?"]),
        (pinned(zzz=(0,)), ["placement.groups.zzz: no such group; there are a, b"]),
        (pinned(a=(0, 1, 2, 3)), ["0 of parallel.ep=4 ranks are free for 1 groups (b)"]),
        (ExplicitSection(slots=(("a/0", "a/1"), ("a/2",), ("b/0",))), ["placement.slots: lists 3 ranks, parallel.ep=4"]),
        (ExplicitSection(slots=(("a/0", "a/1"), ("a/2",), (), ())), ["no rank has b/0"]),
        (ExplicitSection(slots=(("a/0", "a/1"), ("a/2", "b/0"), ("a/0",), ())), ["a/0 is on ranks [0, 2]"]),
        (
            ExplicitSection(slots=(("a/0", "a/3"), ("a/1", "b"), ("a/2", "c/0"), ("b/0",))),
            ["slots.0: 'a/3': group 'a' has the experts 0 to 2", "slots.1: 'b': write 'group/index'", "slots.2: 'c/0'"],
        ),
        (pinned(a=(7,), b=(7,)), ["[7] out of range", "[7] out of range", "[7] already hold group 'a'"]),
    ],
)  # fmt: skip
def test_every_fault_is_named(section: Any, problems: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        place(section, groups(3, 1), 4)
    assert len(raised.value.problems) == len(problems)
    for fault in problems:
        assert any(fault in found for found in raised.value.problems), raised.value.problems


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(SIZES, st.integers(1, 9))
def test_interleaved_is_even(sizes: list[int], ranks: int) -> None:
    of = groups(*sizes)
    placement = make_placement(InterleavedSection(), of, num_ranks=ranks, token_mix={})
    for group in of:
        counts = [len(placement.local_experts(rank, group)) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1
    totals = [len(slots) for slots in placement.slots]
    assert max(totals) - min(totals) <= 1


@given(SIZES, st.integers(0, 5), st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_divided_ranks_have_the_least_busiest_rank(sizes: list[int], spare: int, tokens: list[int]) -> None:
    of = groups(*sizes)
    ranks = len(sizes) + spare
    mix = dict(zip((group.name for group in of), tokens, strict=False))
    placement = make_placement(PinnedSection(), of, num_ranks=ranks, token_mix=mix)
    loads = [group_load(group, mix) for group in of]

    def busiest(shares: tuple[int, ...]) -> float:
        return max(load * -(-n // share) / n for load, n, share in zip(loads, sizes, shares, strict=True))

    best = min(
        busiest(shares) for shares in itertools.product(range(1, ranks + 1), repeat=len(sizes)) if sum(shares) <= ranks
    )
    assert busiest_of(placement, loads) == pytest.approx(best)
    for slots in placement.slots:  # each rank has experts of one group
        assert len({next(g.name for g in of if expert in g.experts) for expert in slots}) <= 1


def busiest_of(placement: ExpertPlacement, loads: list[float]) -> float:
    return max(
        load * len(placement.local_experts(rank, group)) / group.num_experts
        for load, group in zip(loads, placement.groups, strict=True)
        for rank in range(placement.num_ranks)
    )
