"""Tests the rows and pairs of a micro-batch: expected values equal means over drawn tokens, and draws from a trace
equal slow counts."""

import itertools
from collections import Counter

import numpy as np
import pytest

from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.rows import Expected, Traced, Wire, ranks_sharing_a_node

GROUPS = (ExpertGroup("text", 5, 3, 2, 10, 0, ("text",)), ExpertGroup("image", 3, 0, 2, 30, 5, ("image",)))
UNEVEN = ExpertPlacement(GROUPS, ((0, 1, 5), (2,), (), (3, 4, 6, 7)))
TOKENS, LAYERS, SEQUENCES = 12, 2, 5


def draw_ids(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Returns the choices of tokens. Even tokens are text, and odd tokens are image. Columns 8 to 10 are null experts,
    and -2 - c is a dropped pair of column c."""
    ids = np.zeros((tokens, LAYERS, 2), np.int16)
    for t, layer in np.ndindex(tokens, LAYERS):
        ids[t, layer] = rng.choice([*range(5), 8, 9, 10] if t % 2 == 0 else [5, 6, 7], 2, replace=False)
    ids[::5, 0, 0] = -2 - ids[::5, 0, 0]
    return ids


def taken(ids_TK: np.ndarray) -> tuple[list[int], list[int]]:
    token, place = np.nonzero((ids_TK >= 0) & (ids_TK < 8))
    return token.tolist(), ids_TK[token, place].tolist()


def counted(ids_TK: np.ndarray, wire: Wire) -> list[np.ndarray]:
    """Returns the rows of each hop by sender and receiver, [R, R], if each of four ranks has the tokens `ids_TK`. Counted
    row by row: for each token the set of receivers."""
    hops = [np.zeros((4, 4)) for _ in range(2 if wire.once else 1)]
    choices_T: list[list[int]] = ids_TK.tolist()
    for sender, choices in itertools.product(range(4), choices_T):
        ranks = [UNEVEN.rank_of_expert[expert] for expert in choices if 0 <= expert < 8]
        if wire.once is None:
            for rank in ranks if wire.each_pair else set(ranks):
                hops[0][sender, rank] += 1
            continue
        for part in {rank // wire.once for rank in ranks}:
            relay = part * wire.once + sender % wire.once
            hops[0][sender, relay] += 1
            for rank in {rank for rank in ranks if rank // wire.once == part}:
                hops[1][relay, rank] += 1
    return hops


WIRES = [Wire(4), Wire(2), Wire(2, once=2), Wire(4, once=2), Wire(4, once=2, first=3), Wire(3, once=4, first=2),
         Wire(2, each_pair=True), Wire(4, first=3), Wire(3, first=2)]  # fmt: skip


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_traced_rows_are_those_of_a_slow_count(wire: Wire) -> None:
    """Nodes are those of the ranks' positions: the EP group's first rank is at position `wire.first` of its node."""
    one = draw_ids(np.random.default_rng(1), TOKENS)
    traced = Traced(np.concatenate([one] * SEQUENCES), np.repeat(np.arange(SEQUENCES), TOKENS))
    load = traced.load(UNEVEN, wire, tokens=TOKENS, layers=LAYERS)  # every rank draws the same sequence
    rank_of = UNEVEN.rank_of_expert
    for layer, rank in np.ndindex(LAYERS, 4):
        for hop, rows_RR in zip(load.hops, counted(one[:, layer], wire), strict=True):
            other = [each for each in range(4) if each != rank]
            near = [each for each in other if (wire.first + each) // wire.node == (wire.first + rank) // wire.node]
            for peers, sent, most in (
                (near, hop.sent_inside, hop.inside),
                ([each for each in other if each not in near], hop.sent_between, hop.between),
            ):
                assert sent[0, layer, rank] == rows_RR[rank, peers].sum()
                assert most[0, layer, rank] == max(rows_RR[rank, peers].sum(), rows_RR[peers, rank].sum())
        tokens, experts = taken(one[:, layer])
        here = [expert for expert in experts if rank_of[expert] == rank]
        assert load.pairs[0, layer, rank] == 4 * len(here) == 4 * load.own[0, layer, rank]
        assert load.work[0, layer, rank] == 4 * sum(10 if expert < 5 else 30 for expert in here)
        assert load.rows[0, layer, rank] == 4 * len({t for t, e in zip(tokens, experts, strict=True) if rank_of[e] == rank})
    assert not load.spread.any()
    doubled = traced.load(UNEVEN, wire, tokens=2 * TOKENS, layers=LAYERS)
    np.testing.assert_allclose(doubled.hops, 2 * np.array(load.hops))


def test_the_smallest_share_of_a_ring_on_a_node_is_counted() -> None:
    for stride, count, node in ((1, 8, 8), (1, 10, 8), (3, 3, 8), (6, 2, 8), (2, 5, 8), (8, 4, 8), (16, 2, 8)):
        rings = [[(first + stride * i) // node for i in range(count)] for first in range(stride)]
        assert ranks_sharing_a_node(stride, count, node) == min(min(Counter(ring).values()) for ring in rings)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_expectations_are_the_mean_of_uniform_tokens(wire: Wire) -> None:
    ids = draw_ids(np.random.default_rng(0), 6000)
    ids = np.where(ids < -1, -2 - ids, ids)
    expected = Expected({"text": 1, "image": 1}).load(UNEVEN, wire, tokens=600, layers=1)
    drawn = Traced(ids, np.arange(6000) // 100).load(UNEVEN, wire, tokens=600, layers=1)
    for hop, mean in zip(drawn.hops, expected.hops, strict=True):
        for name in ("sent_inside", "sent_between"):
            np.testing.assert_allclose(getattr(hop, name).mean((0, 1)), getattr(mean, name)[0, 0], rtol=0.06)
    for name in ("rows", "pairs", "own", "work"):
        np.testing.assert_allclose(
            getattr(drawn, name).mean((0, 1)), getattr(expected, name)[0, 0], rtol=0.06, err_msg=name
        )
    assert expected.spread[:, 2].tolist() == [0, 0]
    # the standard deviation of a single token's pairs
    several = [np.isin(ids[:, 0], UNEVEN.slots[rank]).sum(1).std() for rank in (0, 1, 3)]
    np.testing.assert_allclose(expected.spread[1, [0, 1, 3]] / np.sqrt(4 * 600), several, rtol=0.05)


def test_expert_choice_has_no_spread_of_pairs() -> None:
    groups = (ExpertGroup("text", 4, 0, 1, 10, 0, ("text",), token_share=0.25),)
    placement = ExpertPlacement.interleaved(groups, 2)
    load = Expected({}).load(placement, Wire(2), tokens=100, layers=3)
    assert not load.spread[1].any()
    assert load.pairs[0, 0].tolist() == [100, 100]
