"""Tests the rows and pairs of a micro-batch: expected values equal means over drawn tokens, and draws from a trace
equal slow counts."""

import numpy as np
import pytest

from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.rows import Expected, Traced, Wire
from tests.reference.layer import expected_node_traffic, expected_traffic

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


@pytest.mark.parametrize("wire", [Wire(4), Wire(2), Wire(2, hops=2), Wire(2, each_pair=True)])
def test_traced_rows_are_those_of_a_slow_count(wire: Wire) -> None:
    one = draw_ids(np.random.default_rng(1), TOKENS)
    traced = Traced(np.concatenate([one] * SEQUENCES), np.repeat(np.arange(SEQUENCES), TOKENS))
    load = traced.load(UNEVEN, wire, tokens=TOKENS, layers=LAYERS)  # every rank draws the same sequence
    rank_of = UNEVEN.rank_of_expert
    for layer, rank in np.ndindex(LAYERS, 4):
        tokens, experts = taken(one[:, layer])
        rows, pairs = expected_traffic(tokens, experts, rank_of, rank)
        inside, between = load.sent_inside[0, layer, rank], load.sent_between[0, layer, rank]
        if wire.hops == 2:
            every = [tokens] * 4, [experts] * 4
            assert (between, inside) == expected_node_traffic(*every, rank_of, ranks_per_node=2, own_rank=rank)
        else:
            assert inside + between == (pairs if wire.each_pair else rows)
        here = [expert for expert in experts if rank_of[expert] == rank]
        each = len(here) if wire.each_pair else len({t for t, e in zip(tokens, experts, strict=True) if rank_of[e] == rank})
        # Rows arrive from the node's other rank. With two hops, it sends its own rows and forwards the rows of one rank of
        # the other node. With one hop, it sends only its own rows.
        arrived = each * ((wire.node - 1) * (2 if wire.hops == 2 else 1))
        assert load.inside[0, layer, rank] == max(inside, arrived)
        if wire.hops == 1:
            assert load.between[0, layer, rank] == max(between, each * (4 - wire.node))
        assert load.pairs[0, layer, rank] == 4 * len(here) == 4 * load.own[0, layer, rank]
        assert load.work[0, layer, rank] == 4 * sum(10 if expert < 5 else 30 for expert in here)
        assert load.rows[0, layer, rank] == 4 * len({t for t, e in zip(tokens, experts, strict=True) if rank_of[e] == rank})
    assert not load.spread.any()
    doubled = traced.load(UNEVEN, wire, tokens=2 * TOKENS, layers=LAYERS)
    np.testing.assert_allclose(doubled.inside, 2 * load.inside)
    assert (load.inside >= load.sent_inside).all()


@pytest.mark.parametrize("wire", [Wire(4), Wire(2), Wire(2, hops=2), Wire(2, each_pair=True)])
def test_expectations_are_the_mean_of_uniform_tokens(wire: Wire) -> None:
    ids = draw_ids(np.random.default_rng(0), 6000)
    ids = np.where(ids < -1, -2 - ids, ids)
    expected = Expected({"text": 1, "image": 1}).load(UNEVEN, wire, tokens=600, layers=1)
    drawn = Traced(ids, np.arange(6000) // 100).load(UNEVEN, wire, tokens=600, layers=1)
    for name in ("sent_inside", "sent_between", "rows", "pairs", "own", "work"):
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
