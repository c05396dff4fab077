"""Training losses equal numbers that are computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from research.experiments.training_loss import training_between


def step(number: int, losses: dict[str, float | None], labels: dict[str, int], **arrays: Any) -> dict[str, Any]:
    return {"step": number, "kind": "step", "losses": losses, "labels": labels, "scalars": {}, "arrays": arrays}


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_means_are_over_the_labels_since_the_last_point(tmp_path: Path) -> None:
    lines = [
        step(1, {"text": 4.0, "image": 2.0}, {"text": 10, "image": 30}),
        step(2, {"text": 2.0, "image": 1.0}, {"text": 30, "image": 30}),
        {"step": 2, "kind": "evaluation", "losses": {"text": 99.0}},
        step(3, {"text": 1.0, "image": None}, {"text": 5, "image": 0}),
        step(4, {"text": 9.0, "image": 9.0}, {"text": 5, "image": 5}),
    ]
    found = training_between(written(tmp_path / "metrics.jsonl", lines), [2, 3])
    assert found == {
        2: {"text": pytest.approx((40 + 60) / 40), "image": pytest.approx(1.5), "all": pytest.approx(190 / 100)},
        3: {"text": 1.0, "all": 1.0},
    }


def test_idle_tokens_are_those_of_all_layers_and_groups(tmp_path: Path) -> None:
    counts = {"idle_LG": [[1, 2], [3, 0]], "tokens_LG": [[6, 2], [6, 2]]}
    lines = [
        step(1, {"text": 1.0}, {"text": 1}, **counts),
        step(2, {"text": 1.0}, {"text": 1}, **{**counts, "idle_LG": [[6, 2], [0, 0]]}),
    ]
    assert training_between(written(tmp_path / "metrics.jsonl", lines), [2])[2]["idle"] == pytest.approx(14 / 32)


def test_steps_without_labels_have_no_loss(tmp_path: Path) -> None:
    lines = [step(1, {"text": None}, {"text": 0})]
    assert training_between(written(tmp_path / "metrics.jsonl", lines), [1]) == {1: {}}
