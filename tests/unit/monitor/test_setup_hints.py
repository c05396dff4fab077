"""A run with a fault in its set-up gets a hint that names the fault, and the run without the fault gets none."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.setup_hints import Settings, evaluation_hints, setup_hints
from moe_dist.monitor.training_hints import Evaluated
from tests.unit.monitor.conftest import MODALITIES, draw_groups, draw_placement, draw_statistics, record_of

GROUPS, STEPS = draw_groups(2, num_experts=8, num_null=0, top_k=2), 50
USUAL = Settings(clip_norm=1.0, weight_decay=0.1)
Change = Callable[[int, Record], dict[str, Any]]


def records(change: Change) -> list[Record]:
    """Returns healthy records of `STEPS` steps. `change` returns new fields of each; new scalars join the others."""
    placement, found = draw_placement(GROUPS, 2), []
    for step in range(1, STEPS + 1):
        record = record_of(draw_statistics(placement, 3, step), placement, MODALITIES)
        usual = {"device/memory": 525 + step / 4, "perf/step_seconds": 0.5, "loss/total": 5.0, "optim/grad_norm": 2.0}
        record = replace(record, scalars={**record.scalars, **usual}, host={"read_seconds": 0.001})
        changed = change(step, record)
        changed["scalars"] = {**record.scalars, **changed.get("scalars", {})}
        found.append(replace(record, **changed))
    return found


def fewer_labels(step: int, record: Record) -> dict[str, Any]:
    return {"labels": {**record.labels, "text": 0 if step > STEPS - 20 else 40}}


def one_hot(step: int, record: Record) -> dict[str, Any]:
    sharp_LG = np.array([[1.0, 1.0], [0.5 ** (step / 8), 1.0], [1.0, 1.0]])
    return {"arrays": {**record.arrays, "entropy_LG": record.arrays["entropy_LG"] * sharp_LG}}


def scalars(**values: Callable[[int], float]) -> Change:
    """Returns a change of scalars, which are given with __ for the slash."""
    return lambda step, _: {"scalars": {name.replace("__", "/"): value(step) for name, value in values.items()}}


@pytest.mark.parametrize(
    ("change", "settings", "kind", "text"),
    [
        (scalars(loss__balance=lambda _: 3.0), USUAL, "outweighed", "loss.balance.schedule"),
        (scalars(), USUAL._replace(clip_norm=1e-7), "clipped", "optimizer.clip_norm=1e-07"),
        (scalars(), USUAL._replace(weight_decay=30.0), "decay", "optimizer.weight_decay=30"),
        (scalars(optim__lr=lambda step: float(step < 20)), USUAL, "rate", "the learning rate is 0"),
        (fewer_labels, USUAL, "unlabelled/text", "no text token was a label"),
        (one_hot, USUAL, "saturated", "MoE layers 1 "),
        (scalars(device__memory=lambda step: 500 + 12 * step), USUAL, "leak", "grows by 12 MiB in each step"),
        (lambda step, _: {"host": {"read_seconds": 0.3}}, USUAL, "reading", "waits 0.30 s of its 0.50 s for data"),
    ],
)
def test_a_fault_is_named(change: Change, settings: Settings, kind: str, text: str) -> None:
    assert list(setup_hints(records(scalars()), USUAL)) == []
    (hint,) = setup_hints(records(change), settings)
    assert hint.kind == kind
    assert text in hint.text


@pytest.mark.parametrize(
    "change",
    [
        scalars(device__memory=lambda step: 500 + 300 * min(step, 25) / 25),  # memory that grows at first
        scalars(optim__lr=lambda step: float(step < STEPS)),  # a schedule that ends with the run
        scalars(loss__balance=lambda step: 3.0 * (step == STEPS)),
        lambda step, record: {"labels": {**record.labels, "text": 0}},  # placeholders of pictures never are labels
        lambda step, record: {
            "arrays": {**record.arrays, "entropy_LG": record.arrays["entropy_LG"] * 0.05}
        },  # from the start
    ],
)
def test_healthy_twins_get_no_hint(change: Change) -> None:
    assert list(setup_hints(records(change), USUAL)) == []


def test_an_evaluation_of_old_weights_is_named() -> None:
    first = Evaluated(30, {"text": 5.0}, {"text": 100}, {"text": 5.2})
    assert list(evaluation_hints([first, first._replace(step=60, held_out={"text": 4.9})])) == []
    (hint,) = evaluation_hints([first, first._replace(step=60, training={"text": 4.0})])
    assert "identical to the last bit" in hint.text
