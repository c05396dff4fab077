"""The first lines: a sick run is named, a healthy one is not accused."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moe_dist.monitor.report.findings import facts, problems
from moe_dist.monitor.report.routing import Routing
from tests.unit.monitor.report.conftest import draw_groups, draw_routing


def towards(group: int, columns: slice, by: float, layers: slice = slice(None)) -> Callable[[np.ndarray, int], None]:
    def bias(preference_LC: np.ndarray, g: int) -> None:
        if g == group:
            preference_LC[layers, columns] += by

    return bias


@pytest.mark.parametrize(
    "routing",
    [
        draw_routing(),
        draw_routing(tokens=40, steps=1),
        draw_routing(layers=1, ranks=1),
        draw_routing(draw_groups(1, num_experts=64, num_null=0, top_k=8), ranks=8),
    ],
    ids=["two groups", "few tokens", "one layer", "64 experts"],
)
def test_a_healthy_run_is_not_accused(routing: Routing) -> None:
    assert problems(routing) == []
    text = "\n".join(facts(routing))
    assert "Dead experts: none" in text
    assert "no pair was dropped" in text


def test_all_tokens_to_one_expert() -> None:
    routing = draw_routing(bias=towards(1, slice(4, 5), 50, slice(2, 3)))
    first = problems(routing)[0]
    assert first.startswith("Image expert 4 takes 100% of its group's tokens in layer 3 (even: ")
    assert "TensorBoard" not in first
    assert "layer 3, image expert 4 takes 100% of the tokens of its group" in facts(routing)[0]
    assert "(now 0.01)" in first
    assert "now" not in problems(replace(routing, balance_coefficient=float("nan")))[0]


def test_dead_experts_and_drops_and_a_busy_rank() -> None:
    routing = draw_routing(bias=towards(0, slice(2, 3), -50, slice(0, 1)))
    assert any("Text expert 2 (layer 1) took no token in the last 3 steps" in text for text in problems(routing))
    assert any(
        "Dead experts: no token took 1 of 64 (layer, expert) pairs: layer 1 text/2." in text for text in facts(routing)
    )
    window = routing.window._replace(dropped_LG=routing.window.choices_LC[:, :2] // 2 * 3)
    dropping = replace(routing, window=window)
    assert any(text.startswith("model.moe.capacity drops ") for text in problems(dropping))
    assert any("Capacity overflow: " in text and "were dropped" in text for text in facts(dropping))
    uneven = draw_routing(bias=towards(1, slice(0, 2), 3), tokens=800)  # both on rank 0
    assert any("Rank 0 of the EP group computes most rows" in text for text in problems(uneven))
    assert any(text.startswith("Busiest rank: rank 0 of 4 computes ") for text in facts(uneven))


def test_no_choice_at_all() -> None:
    routing = draw_routing()
    empty = routing.window._replace(
        choices_LC=np.zeros_like(routing.window.choices_LC), tokens_LG=np.zeros_like(routing.window.tokens_LG)
    )
    assert problems(replace(routing, window=empty)) == []
    assert facts(replace(routing, window=empty))[0] == "No token took a true expert in these steps."
