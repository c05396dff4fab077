"""The report's first lines name the faults of a faulty run, and name no fault of a healthy run."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moe_dist.monitor.report.findings import facts, problems
from moe_dist.monitor.report.page import render
from moe_dist.monitor.report.routing import History, Routing, Subject
from moe_dist.monitor.report.verdicts import headline, verdicts
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
        draw_routing(layers=1, ranks=1),
        draw_routing(draw_groups(1, num_experts=64, num_null=0, top_k=8), ranks=8),
    ],
    ids=["two groups", "one layer", "64 experts"],
)
def test_a_healthy_run_is_not_accused(routing: Routing) -> None:
    assert problems(routing) == []
    text = "\n".join(facts(routing))
    assert "Dead experts: none" in text
    assert "no pair was dropped" in text
    assert "<h2>No rule finds a fault; not judged: loss, speed, data, memory</h2>" in page_of(routing)
    assert (verdicts(routing)[-1].subject, verdicts(routing)[-1].state) == ("Routing", "well")
    assert "Every expert was taken" in page_of(routing)


def page_of(routing: Routing) -> str:
    return render(Subject(replace(routing, tokens=None), None, [], ()))


def test_few_tokens_are_not_judged() -> None:
    group = draw_groups(1, num_experts=128, num_null=0, top_k=8)
    collapsed = draw_routing(
        group, layers=12, tokens=300, steps=1, ranks=1, bias=towards(0, slice(0, 8), 50)
    )  # 18.75 choices per expert
    for routing, cells, none in ((collapsed, "1,536", 1440), (draw_routing(tokens=40, steps=1), "64", 0)):
        page = page_of(routing)
        words = f"too few choices to judge {cells} of {cells} (layer, expert) pairs (fewer than 20 an expert)"
        assert words in "\n".join(facts(routing))
        assert verdicts(routing)[-1].state == "few"
        assert f"Routing</b> not judged: {words}" in page
        assert "Dead experts: none" not in page
        assert (f"no token took {none:,} of these" in page) == (none > 0)
        panel = page.split('<section id="dead-experts"')[1].split("</section>")[0]
        assert f"<p>T{words[1:]}" in panel
        assert "Every expert was taken" not in panel


def test_all_tokens_to_one_expert() -> None:
    routing = draw_routing(bias=towards(1, slice(4, 5), 50, slice(2, 3)))
    first = problems(routing)[0]
    assert first.startswith("Image expert 4 takes 100% of its group's tokens in layer 3, 3.35 x the mean expert (30%)")
    assert "TensorBoard" not in first
    assert "image expert 4 takes 100% of its group's tokens in layer 3, 3.35 x the mean expert (30%)" in facts(routing)[0]
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
    uneven = draw_routing(bias=towards(1, slice(0, 2), 3), tokens=800)  # experts 0 and 1 are on rank 0
    assert any("Rank 0 of the EP group computes most rows" in text for text in problems(uneven))
    assert any(text.startswith("Busiest rank: rank 0 of 4 computes ") for text in facts(uneven))


def test_a_starved_modality_of_a_shared_group() -> None:
    routing = draw_routing(draw_groups(1, num_experts=8, num_null=8, top_k=4))
    shared = (replace(routing.groups[0], modalities=("text", "image")),)
    modality_T, ids_TLK = np.arange(600) % 2, routing.tokens.ids_TLK.copy()
    ids_TLK[modality_T == 1] = np.arange(8, 12)  # image tokens choose only null experts
    fed, starved = (
        replace(routing.tokens, modality_T=modality_T, ids_TLK=ids) for ids in (routing.tokens.ids_TLK, ids_TLK)
    )
    routing = replace(
        routing, placement=replace(routing.placement, groups=shared), modalities=("text", "image"), tokens=starved
    )
    found = problems(routing)
    assert len(found) == 1
    assert found[0].startswith("Image tokens of the text group take 0.00 true experts a layer, but ")
    assert "of text tokens (even: 2.00), in the trace of held-out tokens; try " in found[0]
    few = replace(starved, ids_TLK=ids_TLK[:4], modality_T=modality_T[:4])  # only 16 expected choices of image tokens
    for tokens in (fed, replace(fed, ids_TLK=np.full_like(ids_TLK, 8)), few, None):
        assert problems(replace(routing, tokens=tokens)) == []


def history(steps: int = 120, *, loss: float = -0.01, gpu: float | None = 9.0) -> History:
    """Returns the history of a run whose loss changes by `loss` each step."""
    found = History()
    for step in range(1, steps + 1):
        scalars = {"loss/total": 5 + loss * step, "perf/tokens_per_second": 1000.0, "device/memory": 2048.0}
        line = {"step": step, "kind": "step", "scalars": scalars, "epochs": {"text": 0.5}}
        found.add(
            {**line, "host": {"gpu_used_mib": gpu, "slowest_rank": 1, "slowest_rank_seconds": 2, "other_ranks_seconds": 1}}
        )
    return found


def test_a_subject_is_well_only_if_it_was_judged() -> None:
    def states(**changes: object) -> list[str]:
        return [each.state for each in verdicts(replace(draw_routing(), **{"history": history(), **changes}))]

    assert states() == ["well"] * 5
    assert headline(verdicts(replace(draw_routing(), history=history()))) == ("well", "No rule finds a fault")
    assert states(history=history(29)) == ["few", "few", "few", "well", "well"]
    assert states(history=history(gpu=None)) == ["well", "well", "well", "few", "well"]
    assert states(history=None) == ["few"] * 4 + ["well"]
    assert states(history=history(loss=0.01))[0] == "bad"
    subjects = ("spike/text", "slow", "repeats", "memory", "busy/text")
    for place, kind in enumerate(subjects):
        found = states(hints=((7, kind, "text"),))
        assert [at for at, state in enumerate(found) if state == "bad"] == [place], kind
