"""On random counts load controllers move biases like slow loops. In small cases they move biases as computed by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_dist.errors import DataError
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.rules import ActiveExperts, LossFree
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.placement.placement import ExpertGroup
from tests.reference.layer import bias_steps
from tests.support.counts import counts_with
from tests.support.messages import refused

D = 8
TEXT = ExpertGroup("text", 4, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 2, 2, 8, 4, ("image",), num_identity=1)
PLAIN = ExpertGroup("plain", 3, 0, 2, 8, 6, ("plain",))
GROUPS = (TEXT, IMAGE, PLAIN)
COLUMNS = sum(group.num_columns for group in GROUPS)


class Gate:
    """Stands in for a gate: the biases of one layer and group."""

    def __init__(self, group: ExpertGroup) -> None:
        self.bias = torch.zeros(group.num_columns, dtype=torch.float64)


def controller(*rules: Any, layers: int = 2) -> tuple[BiasController, list[list[Gate]]]:
    gates = [[Gate(group) for group in GROUPS] for _ in range(layers)]
    return BiasController(gates, GROUPS, rules), gates


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Draws the choices of every column, and the tokens of every group, in two layers. Some groups have no tokens."""
    tokens = [[draw(st.sampled_from([0, 1, 7, 40])) for _ in GROUPS] for _ in range(2)]
    choices = []
    for row in tokens:
        counts: dict[str, list[int]] = {}
        for group, count in zip(GROUPS, row, strict=True):
            counts[group.name] = [draw(st.integers(0, count)) for _ in range(group.num_experts)]
        others = COLUMNS - sum(group.num_experts for group in GROUPS)
        choices.append([*(c for group in GROUPS for c in counts[group.name]), *([3] * others)])
    return choices, tokens


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(loads(), min_size=1, max_size=4),
    per=st.sampled_from(["group", "expert"]),
    decay=st.sampled_from([None, 3]),
)
def test_biases_equal_the_loops(steps: list[tuple[Any, Any]], per: Any, decay: int | None) -> None:
    target = {"text": 1.5, "image": 0.7}
    moved, gates = controller(ActiveExperts(target, rate=0.3, decay_steps=decay, per=per), LossFree(rate=1e-2))
    expected = [[[0.0] * group.num_experts for group in GROUPS] for _ in range(2)]
    for number, (choices, tokens) in enumerate(steps):
        moved.after_step(counts_with(choices_LC=torch.tensor(choices).double(), tokens_LG=torch.tensor(tokens).double()))
        rate = 0.3 / (1 + number / decay) if decay else 0.3
        for layer in range(2):
            for index, group in enumerate(GROUPS):
                expected[layer][index] = bias_steps(
                    expected[layer][index],
                    choices[layer][group.first_expert : group.first_expert + group.num_experts],
                    tokens[layer][index],
                    top_k=group.top_k,
                    target=target.get(group.name),
                    rate=rate,
                    per_expert=per == "expert",
                    sign_rate=1e-2,
                    others=group is not PLAIN,
                )
    for layer in range(2):
        for index, group in enumerate(GROUPS):
            bias = gates[layer][index].bias
            torch.testing.assert_close(bias[: group.num_experts].tolist(), expected[layer][index], rtol=0, atol=1e-13)
            assert not bias[group.num_experts :].any(), "null and zero-computation columns stay where they are"
    assert moved.state() == {"step": len(steps)}


def counts_of(true_text: Sequence[int], tokens: int) -> RoutingCounts[torch.Tensor]:
    """Returns the counts of one layer in which only the text group was chosen."""
    choices = torch.zeros(1, COLUMNS, dtype=torch.float64)
    choices[0, : TEXT.num_experts] = torch.tensor(true_text, dtype=torch.float64)
    return counts_with(choices_LC=choices, tokens_LG=torch.tensor([[tokens, 0, 0]], dtype=torch.float64))


def test_the_target_falls_from_all_true_experts_in_a_line() -> None:
    """With 4 true experts and 3 choices the target falls from 3 to 1.5 in steps of 0.5, and stays there. If each step takes
    1 true expert per token less than its target, the biases move by the same amount in each step."""
    group = ExpertGroup("text", 4, 2, 3, 5, 0, ("text",))
    rule = ActiveExperts({"text": 1.5}, rate=3.0 * 4, ramp_steps=3)
    for step, target in enumerate((3.0, 2.5, 2.0, 1.5, 1.5)):
        assert rule.target_at(step, group) == pytest.approx(target)
        delta = rule.delta(group, torch.full((1, 4), (target - 1.0) / 4), torch.ones(1, 1), step)
        torch.testing.assert_close(delta, torch.ones(1, 4))


def test_the_schedule_multiplies_the_target() -> None:
    rule = ActiveExperts({"text": 1.5}, rate=1.0, schedule=[(0, 2.0), (3, 1.0)])
    true, tokens = torch.full((1, 4), 1.5 / 4, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    deltas = [rule.delta(TEXT, true, tokens, step) for step in (0, 2, 3, 9)]
    by_hand = [1.5 / 12, 1.5 / 12, 0.0, 0.0]
    assert [float(each[0, 0]) for each in deltas if each is not None] == pytest.approx(by_hand)
    assert [rule.target_at(step, TEXT) for step in (0, 2, 3, 9)] == [3.0, 3.0, 1.5, 1.5]


def test_a_proportional_integral_controller_is_the_sum_of_errors_and_the_last_one() -> None:
    """After each step the bias is (rate sum e + p (e - first e)) / k, where e is the step's error and "sum e" the sum
    over all steps so far. A step without tokens changes nothing, and a controller continues from a saved state."""
    rule = {"rate": 0.3, "proportional": 0.7}
    moved, gates = controller(ActiveExperts({"text": 1.5}, **rule), layers=1)
    trues = [[0, 0, 0, 0], [2, 3, 1, 4], [9, 1, 1, 1], [0, 0, 0, 0], [0, 2, 0, 0]]
    tokens, errors = [0, 10, 10, 0, 10], list[float]()
    for number, (true, count) in enumerate(zip(trues, tokens, strict=True)):
        if number in (1, 3):
            kept = moved.state()
            again, others = controller(ActiveExperts({"text": 1.5}, **rule), layers=1)
            others[0][0].bias.copy_(gates[0][0].bias)
            again.restore(kept)
            moved, gates = again, others
        moved.after_step(counts_of(true, count))
        if count:
            errors.append((1.5 - sum(true) / count) / 4)
        bias = (0.3 * sum(errors) + 0.7 * (errors[-1] - errors[0])) / 3 if errors else 0.0
        assert gates[0][0].bias[:4].tolist() == pytest.approx([bias] * 4)


@pytest.mark.parametrize(
    "rules",
    [
        [1],
        {"0": 3},
        {"0": {"text": [1.0]}},
        {"0": {"text": "x"}},
        {"0": {"text": [[0.1] * 4]}},  # only one of two layers
        {"0": {"text": [[0.1] * 3] * 2}},  # only three of four experts
        {"0": {"text": [[0.1], [0.1]]}},  # torch would broadcast it to all experts
        {"0": {"text": [[0.1] * 4, [0.1]]}},
        {"0": {"text": [[10**400] * 4] * 2}},
        {"0": {"texts": [[0.1] * 4] * 2}},
    ],
    ids=lambda rules: str(rules)[:60],
)
def test_a_state_without_errors_is_a_data_error(rules: Any) -> None:
    with refused(DataError):
        controller(ActiveExperts({"text": 1.5}, rate=1.0, proportional=1.0))[0].restore({"step": 3, "rules": rules})


@pytest.mark.parametrize(
    "state",
    [None, 3, {}, {"step": -1}, {"step": True}, {"step": 1.0}, {"step": 10**400}],
    ids=lambda state: str(state)[:20],
)
def test_a_state_that_is_none_is_a_data_error(state: Any) -> None:
    with refused(DataError):
        controller(LossFree(rate=1.0))[0].restore(state)


def test_a_bias_chooses_and_never_weighs() -> None:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(D, (TEXT,)), selection_bias=True).double()
    gate: Any = router.get_submodule("group:text")
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    h_TD, group_T = torch.randn(50, D, dtype=torch.double), torch.zeros(50, dtype=torch.int64)
    plain = router(h_TD, group_T)
    gate.bias[:4] += 10.0  # all true experts score above all null experts
    moved = router(h_TD, group_T)
    assert (moved.assignments.expert_N >= 0).all()
    torch.testing.assert_close(moved.aux.prob_LC[0], plain.aux.prob_LC[0], rtol=0, atol=0)
    logits = h_TD @ gate.true.T
    top = logits.topk(3)
    assert torch.equal(moved.assignments.expert_N.view(50, 3), top.indices)
    torch.testing.assert_close(moved.assignments.weight_N.view(50, 3), top.values.softmax(-1), rtol=0, atol=1e-14)
