"""The measures of a run equal numbers that are computed by hand."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from moe_dist.data.batch import BatchMaker, Segment
from moe_dist.model.mixture_of_depths import Chosen, DepthRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.counts import AuxSums, RoutingCounts
from moe_dist.moe.routing.types import ABSENT, Assignments, Routing
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from research.experiments.measure import Spent, planned, spent_by_step
from research.experiments.probes import bound_for_load, changed_routing, flip, flip_depths, second_weights, threshold
from research.experiments.tokens import SentRows, Tokens, binned, input_filler, loads, losses, tables_of
from tests.support.messages import refused

GROUP = ExpertGroup("all", num_experts=4, num_null=2, top_k=2, ffn_dim=4, first_expert=0, modalities=("text",))

R = TypeVar("R", bound=nn.Module)


def routing(pairs: list[tuple[int, int]], *, tokens: int, nulls: int = 0) -> Routing:
    token_N, expert_N = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
    choices_C = torch.bincount(expert_N[expert_N != ABSENT], minlength=6)
    choices_C[4] += nulls
    zeros_LG = torch.zeros(1, 1)
    counts = RoutingCounts(choices_C[None], torch.tensor([[tokens]]), zeros_LG, torch.zeros((1, 4), dtype=torch.int64))
    assignments = Assignments(token_N, expert_N, torch.full((len(pairs),), 0.5))
    return Routing(assignments, counts, AuxSums(torch.zeros(1, 6), zeros_LG))


def test_rows_on_the_wire_by_hand() -> None:
    """Rank 0 has experts 0 and 1 and tokens 0 and 1; rank 1 has experts 2 and 3 and tokens 2 and 3.

    token 0: experts 0, 1    both on rank 0                     0 rows, 0 remote pairs
    token 1: experts 2, 3    both on rank 1                     1 row,  2 remote pairs
    token 2: expert 1, null  on rank 0                          1 row,  1 remote pair
    token 3: expert 2, null  on rank 1                          0 rows, 0 remote pairs
    """
    count = SentRows(ExpertPlacement((GROUP,), ((0, 1), (2, 3))))
    pairs = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 1), (2, ABSENT), (3, 2), (3, ABSENT)]
    count.add(routing(pairs, tokens=4, nulls=2), np.array([0, 0, 1, 1]))
    found = {key: 4 * value for key, value in count.per_token().items()}
    assert found["rows_remote"] == 2
    assert found["rows_per_pair"] == 3
    assert found["rows_topk"] == 4 * 2 * 0.5, "half of a choice's experts are elsewhere"
    assert found["rows_same_active"] == 6 * 0.5
    assert found["rows_null_remapped"] == 3 + 2 * 0.5


def test_a_token_is_filler_by_its_own_cell_and_not_by_the_next_ones() -> None:
    maker = BatchMaker(seq_len=7, pad_id=0, modalities=(((0, 4),), ((4, 8),)))
    one = Segment(np.array([1, 4, 5, 2]), np.array([False, True, False, False]), 4)
    other = Segment(np.array([5, 6]), np.array([True, True]), 2)
    batch = maker.make([[one, other]])
    assert batch.filler_BS[0].tolist() == [True, False, False, False, True, False, False]
    # The second document's first token, 5, is filler too. It is no label, so the batch does not show that.
    assert input_filler(batch)[0].tolist() == [False, True, False, False, False, True, False]


def tokens() -> Tokens:
    image = np.array([False, False, True, True, True])
    filler = np.array([False, False, True, False, True])
    return Tokens(
        loss_N=np.array([4.0, 2.0, 0.5, 3.0, 0.25]),
        load_NL=np.array([[2.0, 2.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
        input_N=np.arange(5),
        label_N=np.arange(5),
        input_filler_N=filler,
        label_filler_N=np.roll(filler, -1),
        input_image_N=image,
        label_image_N=np.array([False, True, True, True, False]),
    )


def test_losses_and_loads_by_hand() -> None:
    found = losses(tokens())
    assert found == {
        "all": 9.75 / 5, "text": 4.25 / 2, "image": 5.5 / 3, "image_no_filler": pytest.approx(0.5),
    }  # fmt: skip
    load = loads(tokens())
    assert load["all"] == pytest.approx(1.0)
    assert load["by_layer"] == [1.0, 1.0]
    assert load["idle"] == pytest.approx(0.3)
    assert load["by_input"] == {"text": 1.75, "image": 0.5, "image_filler": 0.25, "image_drawn": 1.0}
    assert load["by_label"]["text"] == 1.0


def test_bins_hold_each_token_once_and_modalities_apart() -> None:
    table = binned(tokens(), tokens().loss_N, bins=2)
    assert [(row["text"]["tokens"], row["image"]["tokens"]) for row in table] == [(0, 2), (2, 1)]
    assert table[0]["text"]["load"] is None
    assert table[0]["image"]["load"] == pytest.approx(0.25)
    assert table[1]["text"]["load"] == pytest.approx(1.75)
    assert sum(row[name]["tokens"] for row in binned(tokens(), np.zeros(5)) for name in ("text", "image")) == 5


def test_tables_of_loads_by_hand() -> None:
    """Id 2 is an image code with two tokens, id 4 an image code without tokens, and id 1 a text id without tokens."""
    seen = replace(tokens(), input_N=np.array([0, 0, 2, 3, 2]))
    by_id_LV, by_modality_LV = tables_of(seen, np.array([False, False, True, True, True]))
    np.testing.assert_allclose(by_id_LV, [[2.0, 2.0, 0.0, 1.0, 1 / 3], [1.5, 1.5, 0.5, 1.0, 2 / 3]])
    np.testing.assert_allclose(by_modality_LV, [[2.0, 2.0, 1 / 3, 1 / 3, 1 / 3], [1.5, 1.5, 2 / 3, 2 / 3, 2 / 3]])


def test_costs_count_each_groups_experts_whatever_the_scalars_are_named(tmp_path: Path) -> None:
    """Both layers have 10 tokens of group a (experts 0 and 1) and none of group b. These tokens make 10 choices in the
    first layer, and 15 in the second layer, which drops one."""
    other = ExpertGroup("b", num_experts=1, num_null=0, top_k=1, ffn_dim=4, first_expert=2, modalities=("image",))
    groups = (ExpertGroup("a", num_experts=2, num_null=0, top_k=2, ffn_dim=4, first_expert=0, modalities=("text",)), other)
    arrays = {"choices_LC": [[4, 6, 0], [8, 7, 0]], "tokens_LG": [[10, 0], [10, 0]], "dropped_LG": [[0, 0], [1, 0]]}
    line = {
        "kind": "step", "step": 1, "arrays": arrays, "ledger": {"payload_bytes": 3, "metadata_bytes": 1},
        "scalars": {"optim/tokens": 10, "perf/step_seconds": 0.5, "moe/experts_per_token/mean": 9.0},
    }  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line) + "\n")
    asked = []

    def flops(experts: dict[str, float], share: dict[str, float]) -> float:
        asked.append((experts, share))
        return 100.0

    plan: Any = SimpleNamespace(placement=ExpertPlacement(groups, ((0, 1, 2),)), flops_per_token=flops)
    assert spent_by_step(path, plan, Spent(tokens=5, flops=1.0)) == {1: Spent(10 + 5, 1001.0, 0.5, 4.0)}
    assert asked == [({"a": 24 / 20, "b": 0.0}, {"a": 1.0, "b": 0.0})]


FOUR = ExpertGroup("all", num_experts=4, num_null=0, top_k=2, ffn_dim=4, first_expert=0, modalities=("text",))


def router() -> TopKRouter:
    return with_identity_rows(TopKRouter(RouterContext(4, [FOUR])))


def choosing_router(**settings: Any) -> ExpertChoiceRouter:
    return with_identity_rows(ExpertChoiceRouter(RouterContext(4, [FOUR]), **settings))


def with_identity_rows(made: R) -> R:
    with torch.no_grad():
        made.get_parameter("group:all.true").copy_(torch.eye(4))
    return made


def test_second_experts_below_the_bound_are_dropped_and_the_first_has_all() -> None:
    h_TD = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.9, 0.0]])
    plain = router()(h_TD, torch.zeros(2, dtype=torch.int64))
    second_T = second_weights(plain, 2)
    assert second_T.tolist() == pytest.approx([1 / (1 + np.exp(2.0)), 1 / (1 + np.exp(0.1))])
    module = router()
    with changed_routing([module], threshold(bound_for_load(second_T, 1.5))):
        pairs = module(h_TD, torch.zeros(2, dtype=torch.int64)).assignments.taken()
    assert list(zip(pairs.token_N.tolist(), pairs.expert_N.tolist(), strict=True)) == [(0, 0), (1, 1), (1, 2)]
    assert pairs.weight_N.tolist() == pytest.approx([1.0, 1 - float(second_T[1]), float(second_T[1])])
    assert len(module(h_TD, torch.zeros(2, dtype=torch.int64)).assignments.taken().token_N) == 4, "as it was again"
    with refused(ValueError):
        bound_for_load(second_T, 0.9)


def test_a_flip_repeats_and_weighs_by_the_routers_own_score() -> None:
    h_TD = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    group_T = torch.zeros(200, dtype=torch.int64)
    module = choosing_router()

    def pairs(percent: float) -> Assignments:
        with changed_routing([module], flip(percent, seed=0)):
            return module(h_TD, group_T).assignments

    once, again = pairs(10.0), pairs(10.0)
    assert torch.equal(once.token_N, again.token_N)
    assert torch.equal(once.expert_N, again.expert_N)
    assert len(once.token_N) == 400
    torch.testing.assert_close(once.weight_N, h_TD.sigmoid()[once.token_N, once.expert_N])
    chosen, unflipped = (set(zip(*(each.tolist() for each in found[:2]), strict=True)) for found in (once, pairs(0.0)))
    assert chosen != unflipped


def test_a_flip_of_depths_exchanges_tokens_and_weighs_by_the_routers_own_score() -> None:
    """The last 20 of 200 tokens are padding. A token's score is its first component, and the threshold takes about half of
    the 180 real tokens."""
    x_TD = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    real_T = torch.arange(200) < 180
    module = DepthRouter(4, capacity=0.5, causal="threshold").eval()
    with torch.no_grad():
        module.router.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        module.threshold.fill_(0.5)

    def chosen(percent: float | None) -> Chosen:
        with changed_routing([module] if percent is not None else [], flip_depths(percent or 0.0, seed=0)):
            return module(x_TD, real_T)

    alone, none, some, again = (chosen(percent) for percent in (None, 0.0, 20.0, 20.0))
    taken = ((x_TD[:, 0] > 0) & real_T).nonzero().flatten()
    assert torch.equal(alone.index_C, taken)
    assert torch.equal(none.index_C, taken)
    torch.testing.assert_close(none.weight_C, alone.weight_C)
    assert torch.equal(some.index_C, again.index_C)
    assert len(some.index_C) == len(taken)
    assert some.full_C.all()
    assert some.index_C.max() < 180, "padding is not taken"
    assert torch.equal(some.index_C, some.index_C.sort().values), "in the order of the sequence"
    given_up = set(taken.tolist()) - set(some.index_C.tolist())
    assert abs(len(given_up) - 0.2 * len(taken)) < 4 * (0.2 * len(taken)) ** 0.5
    torch.testing.assert_close(some.weight_C, module.takes(x_TD)[1][some.index_C])


def test_the_checkpoint_of_a_stop_counts_in_no_mean() -> None:
    assert planned([73, 82, 146, 219, 220], every=73, last=220) == [73, 146, 219, 220]
