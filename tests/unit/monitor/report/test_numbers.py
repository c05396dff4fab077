"""The numbers of a report equal slow references. `numbers.py` explains the shape letters."""

import math

import numpy as np
import pytest

from moe_dist.monitor.report import numbers
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica
from tests.unit.monitor.report.conftest import draw_routing


def test_gini_of_known_loads() -> None:
    loads = np.array([[2.0, 2, 2, 2], [0, 0, 0, 7], [1, 2, 3, 4], [0, 0, 0, 0]])
    gini = numbers.gini(loads)
    assert gini[:2].tolist() == [0.0, 0.75]
    pairs = sum(abs(a - b) for a in loads[2] for b in loads[2])
    assert gini[2] == pytest.approx(pairs / (2 * 4 * loads[2].sum()))  # mean difference / (2 x mean load)
    assert math.isnan(gini[3])
    assert numbers.lorenz(loads)[2].tolist() == [0.0, 0.1, 0.3, 0.6, 1.0]


def test_distance_of_choices() -> None:
    one, other = np.array([[1, 1, 0], [4, 0, 0], [0, 0, 0]]), np.array([[2, 0, 2], [0, 0, 3], [1, 1, 1]])
    assert numbers.distance(one, other)[:2].tolist() == [0.5, 1.0]
    assert math.isnan(numbers.distance(one, other)[2])


def test_pairs_of_experts() -> None:
    routing = draw_routing(tokens=200)
    for group in routing.groups:
        ids_TK = routing.tokens.ids_TLK[:, 1]
        sets = [{int(e) for e in row if e in group.experts} for row in ids_TK]
        taken_Tn = numbers.taken(ids_TK, group)
        lift_nn = numbers.together(taken_Tn)
        for a, b in np.ndindex(8, 8):
            first, second = group.first_expert + a, group.first_expert + b
            shares = [sum(first in each for each in sets), sum(second in each for each in sets)]
            both = sum(first in each and second in each for each in sets)
            if a == b:
                assert np.isnan(lift_nn[a, b])
            else:
                assert lift_nn[a, b] == pytest.approx(both * len(sets) / (shares[0] * shares[1]), rel=1e-5)


def test_tokens_that_tell_most_of_an_expert() -> None:
    token_T = np.array([7] * 6 + [8] * 6 + [9] * 6 + [3] * 2)
    taken_Tn = np.zeros((20, 2), bool)
    taken_Tn[0:6, 0] = True  # expert 0 takes all tokens with id 7, and half of those with id 8
    taken_Tn[9:12, 0] = taken_Tn[12:14, 1] = taken_Tn[18:20, 1] = True
    first, second = numbers.special_tokens(token_T, taken_Tn, most=3)
    assert [(each.token, each.times, each.share, each.row) for each in first] == [(7, 6, 1.0, 0), (8, 3, 0.5, 9)]
    assert first[0].lift == pytest.approx(1 / (9 / 20))
    assert second == []  # expert 1 takes no id three times


@pytest.mark.parametrize(
    ("ranks", "pinned", "replicas", "first"),
    [
        (1, False, 0, 0),
        (3, False, 0, 1),
        (4, False, 0, 0),
        (4, True, 0, 1),
        (16, False, 0, 0),
        (4, True, 1, 0),
        (4, False, 3, 2),
    ],
)
def test_rows_are_those_of_a_slow_count(ranks: int, pinned: bool, replicas: int, first: int) -> None:
    """In the second layer experts 0 and 9 have `replicas` replicas each."""
    routing = draw_routing(tokens=120, layers=2)
    tokens = routing.tokens
    tokens.ids_TLK[::7, 0, 0] = -2 - 3  # drops these pairs; a dropped pair sends no row
    placement = ExpertPlacement.interleaved(routing.groups, ranks)
    if pinned:
        placement = ExpertPlacement(routing.groups, tuple(tuple(range(4 * rank, 4 * rank + 4)) for rank in range(4)))
    own = placement.rank_of_expert
    copies = sorted(Replica(e, (own[e] + after) % ranks) for e in (0, 9) for after in range(1, replicas + 1))
    placement = PlacementWithReplicas(routing.groups, placement.slots, ((), tuple(copies)))
    home = (tokens.sequence_T // 2 % ranks).tolist()
    found = numbers.traffic(tokens.ids_TLK, tokens.sequence_T, placement, (1, 2, 3), micro_batch=2, first=first)
    pairs = remote = rows = 0
    between, once = {1: 0, 2: 0, 3: 0}, {1: 0, 2: 0, 3: 0}
    work = np.zeros((2, ranks))
    for t, layer in np.ndindex(120, 2):
        experts = [int(e) for e in tokens.ids_TLK[t, layer] if 0 <= e < 16]
        in_layer, ids = placement.in_layer(layer), placement.id_of_expert(layer, home[t])
        goes = [in_layer.rank_of_expert[ids[e]] for e in experts]
        away = [rank for rank in goes if rank != home[t]]
        pairs, remote, rows = pairs + len(goes), remote + len(away), rows + len(set(away))
        for size in between:
            node = [(first + rank) // size for rank in range(ranks)]
            between[size] += len({rank for rank in away if node[rank] != node[home[t]]})
            once[size] += len({node[rank] for rank in away} - {node[home[t]]})
        for expert, rank in zip(experts, goes, strict=True):
            work[layer, rank] += routing.groups[expert // 8].ffn_dim
    assert found[:5] == (pairs, remote, rows, between, once)
    assert found.imbalance == pytest.approx((work.max(1) / work.mean(1)).mean())


def test_experts_in_common() -> None:
    one = np.array([[[0, 1], [2, 9]], [[3, -1], [9, 9]]])
    other = np.array([[[1, 2], [2, 9]], [[3, -4], [9, 9]]])
    assert numbers.same_experts(one, other, 8).tolist() == [2 / 4, 1.0]
    assert math.isnan(numbers.same_experts(one[1:], other[1:], 8)[1])
