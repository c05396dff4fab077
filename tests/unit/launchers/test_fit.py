"""Tests the error that says why nodes do not fit a plan."""

import pytest

from launchers.command import NodePlan
from launchers.fit import Offer, Want, fit_result, unmet
from moe_dist.runtime.node.check_result import Level

TEXT, VISION = frozenset(["text"]), frozenset(["vision"])


def want(rank: int, traits: frozenset[str] = frozenset(), *, count: int = 1, **amounts: float) -> Want:
    return Want(NodePlan(rank, tuple(range(rank, rank + count)), groups=tuple(sorted(traits))), traits, amounts)


def offer(name: str, traits: frozenset[str] = frozenset(), *, down: str = "", **amounts: float) -> Offer:
    return Offer(name, traits, amounts or {"CPU": 8}, down)


@pytest.mark.parametrize(
    ("wants", "offers", "problems"),
    [
        ([want(0, TEXT), want(1, VISION)], [offer("a", VISION), offer("b", TEXT | VISION)], []),
        ([want(0), want(1, TEXT), want(2, TEXT | VISION)], [offer("a", TEXT | VISION), offer("b", TEXT), offer("c")], []),
        ([want(0, TEXT)], [offer("a", TEXT, down="down"), offer("b", TEXT)], []),
        (
            [want(0, TEXT), want(2, frozenset(["hearing"]))],
            [offer("a", TEXT), offer("b", VISION)],
            ["rank 2 (experts of hearing): the pool has no node with the feature hearing; its nodes have text and"],
        ),
        (
            [want(0, TEXT, count=8, GPU=8)],
            [offer("a", TEXT, GPU=4), offer("b", VISION, GPU=8)],
            [
                "ranks 0-7 (experts of text): needs 8 GPU on one node, but the largest of the pool with the feature text "
                "has 4 GPU; "
            ],
        ),
        (
            [want(0, TEXT), want(1, TEXT), want(2, VISION)],
            [offer("a", TEXT), offer("b", TEXT, down="drained"), offer("c", VISION)],
            [
                "rank 1 (experts of text): the plan needs 2 nodes with the feature text, but the pool has 1 that can be "
                "used (a, b is drained); "
            ],
        ),
        ([want(0)], [], ["rank 0: the pool has no node; "]),
    ],
    ids=["enough", "demanding first", "down but spare", "no such trait", "too small", "too few", "empty"],
)
def test_each_planned_node_without_a_node_is_named_with_the_reason(
    wants: list[Want], offers: list[Offer], problems: list[str]
) -> None:
    found = unmet(wants, offers, word="feature", where="the pool")
    assert [problem[: len(words)] for problem, words in zip(found, problems, strict=True)] == problems
    result = fit_result(found, len(wants), len(offers), "the pool")
    assert (result.level, result.verdict) == ((Level.ERROR, 69) if problems else (Level.OK, 0))
