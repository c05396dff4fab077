"""Planted faults of weights and updates get a hint that names the cause, and healthy twins get none.

Shape letters: N tensors, X elements of a sketch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.statistics import WeightTable
from tests.unit.monitor.conftest import MODALITIES, draw_groups, draw_placement, draw_statistics, record_of

GROUPS = draw_groups(2, num_experts=6, num_null=2, top_k=2)
PLACEMENT, LAYERS = draw_placement(GROUPS, 2), (1, 2, 3)
KINDS = ("update", "untrained", "unchanged", "zero", "scale", "twins", "zero_output")
WEIGHT, UPDATE, GRADIENT = range(3)
Change = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], None]


def names() -> list[str]:
    found = ["embedding.weight", "output.weight", "norm.weight"]
    for layer in LAYERS:
        found += [
            f"layers.{layer}.{name}" for name in ("attention.q.weight", "moe.norm.weight", "moe.router.group:.weight")
        ]
        for group in GROUPS:
            experts = [f"layers.{layer}.moe.experts.{group.name}.{i}" for i in range(group.num_experts)]
            found += [f"{expert}.{matrix}" for matrix in ("gate", "up", "down") for expert in experts]
    return found


def draw(rng: np.random.Generator, change: Change) -> WeightTable:
    """Returns a healthy table that `change` alters: an update is 1 % of a matrix, and 0.1 % of a norm's weights."""
    squares, sketches = {}, {}
    for name in names():
        share = 0.001 if "norm" in name else 0.01
        squares[name] = rng.lognormal(0, 0.3, 3) * [1.0, share**2, 1e-6]
        sketches[name] = rng.normal(size=16)
    outputs = np.stack([40 * rng.lognormal(0, 0.6, (len(LAYERS), 12)), np.full((len(LAYERS), 12), 40)], axis=2)
    change(squares, sketches if change.__name__ != "of_output" else {"": outputs})
    return WeightTable(tuple(squares), np.stack([*squares.values()]), np.stack([*sketches.values()]), outputs)


def hints(change: Change, **changes: Any) -> dict[str, str]:
    """Returns the hints about weights after steps 25 and 50, by kind."""
    rng, watch, found = np.random.default_rng(0), HintWatch(GROUPS, LAYERS), {}
    for step in (25, 50):
        drawn = draw_statistics(PLACEMENT, len(LAYERS), step).result.counts
        more = {"choices_LC": np.full_like(drawn.choices_LC, 40), **changes}
        statistics = draw_statistics(PLACEMENT, len(LAYERS), step, **more, weights=draw(rng, change))
        found |= {hint.kind: hint.text for hint in watch.update(record_of(statistics, PLACEMENT, MODALITIES))}
    return {kind: text for kind, text in found.items() if kind.partition("/")[0] in KINDS}


def scaled(column: int, factor: float, *parts: str) -> Change:
    """Multiplies the norm of the weights, updates or gradients of the tensors whose name has one of `parts`."""

    def change(squares: dict[str, np.ndarray], _: dict[str, np.ndarray]) -> None:
        for name in squares:
            if any(part in name for part in parts):
                squares[name][column] *= factor**2

    return change


def copied(*pairs: tuple[int, int]) -> Change:
    """Gives experts of layer 2 the weights of other experts."""

    def change(_: dict[str, np.ndarray], sketches: dict[str, np.ndarray]) -> None:
        for source, target in pairs:
            for matrix in ("gate", "up", "down"):
                bank = "layers.2.moe.experts.image"
                sketches[f"{bank}.{target}.{matrix}"] = 1.01 * sketches[f"{bank}.{source}.{matrix}"]

    return change


def output(layer: int, expert: int, factor: float, pairs: int = 40) -> Change:
    """Multiplies an expert's output. Experts 0 to 5 are text, 6 to 11 image."""

    def of_output(_: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
        found[""][LAYERS.index(layer), expert] *= factor**2, pairs / 40

    return of_output


def zero_norm(squares: dict[str, np.ndarray], _: dict[str, np.ndarray]) -> None:
    squares["layers.2.post_attention_layernorm.weight"] = squares.pop("layers.2.moe.norm.weight") * [0, 1, 1]


ALL = ("",)
# Name -> (change of the measured tensors, kind of hint, words in its text)
FAULTS: dict[str, tuple[Change, str, Sequence[str]]] = {
    "learning rate x 30": (scaled(UPDATE, 30, *ALL), "update", ["learning rate is too high", "attention 0.3", "experts"]),
    "only norms show it": (scaled(UPDATE, 30, "norm"), "update", ["learning rate is too high", "norms 0.03"]),
    "learning rate far too low": (scaled(UPDATE, 1e-5, *ALL), "update", ["learning rate is too low"]),
    "routers without gradient": (
        scaled(GRADIENT, 0, ".router."), "untrained/routers", ["reaches the routers of layers 1, 2, 3 in steps 25"],
    ),
    "a layer's attention": (
        scaled(GRADIENT, 0, "layers.2.attention"), "untrained/attention", ["no gradient reaches the attention of layer 2"],
    ),
    "an expert's output is not used": (
        scaled(GRADIENT, 0, "layers.3.moe.experts.text.4."), "untrained/experts", ["the experts of layer 3 (text 4)"],
    ),
    "weights that the optimizer lacks": (
        scaled(UPDATE, 0, "layers.1.moe.norm"), "unchanged/norms", ["do not change the norms of layer 1 in"],
    ),
    "an expert of zeros": (scaled(WEIGHT, 0, "layers.2.moe.experts.image.5.down"), "zero", ["is zero: layer 2 (image 5)"]),
    "all experts of a layer are zero": (scaled(WEIGHT, 0, "layers.3.moe.experts"), "zero", ["layer 3 (image 0, image 1"]),
    "an expert x 50": (scaled(WEIGHT, 50, "layers.1.moe.experts.text.2.down"), "scale", ["expert 2 in layer 1 are "]),
    "a norm of a transformers model is zero": (zero_norm, "zero/norms", ["the weight of a norm is 0 in layer 2"]),
    "an output of zero": (output(2, 8, 0), "zero_output", ["is zero for all tokens", "layer 2 (image 2)"]),
    "twins": (copied((1, 4)), "twins", ["image experts 1 and 4 of layer 2 have the same weights"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    change, kind, words = FAULTS[name]
    found = hints(change)
    assert list(found) == [kind], "the fault is not named, or not by its cause alone"
    for each in words:
        assert each in found[kind]


def test_updates_that_are_too_small_are_named_where_the_loss_does_not_fall() -> None:
    rng, watch, found = np.random.default_rng(0), HintWatch(GROUPS, LAYERS), {}
    for step in range(1, 101):
        weights = draw(rng, scaled(UPDATE, 1e-3, *ALL)) if step % 25 == 0 else None
        changes = {"nll_M": 8.3 * np.array([40, 41]) * rng.normal(1, 0.003, 2), "weights": weights}
        record = record_of(draw_statistics(PLACEMENT, len(LAYERS), step, **changes), PLACEMENT, MODALITIES)
        found |= {hint.kind: hint.text for hint in watch.update(record)}
    assert "an update is only 1e-05 of the weights" in found["loss"]
    assert "try a higher optimizer.lr" in found["loss"]


HEALTHY: dict[str, tuple[Change, dict[str, Any]]] = {
    "usual": (scaled(UPDATE, 1, *ALL), {}),
    "early updates of a small model": (scaled(UPDATE, 3, *ALL), {}),
    "fine-tuning": (scaled(UPDATE, 3e-3, *ALL), {}),
    "experts that no token chose": (scaled(GRADIENT, 0, "experts.text.4."), {"choices_LC": np.zeros((3, 16), np.int64)}),
    "no token of the step": (scaled(GRADIENT, 0, "embedding"), {}),
    "a schedule that ends at 0": (scaled(UPDATE, 0, *ALL), {"lr": 0.0}),
    "experts copied from one dense layer": (copied(*((0, i) for i in range(1, 6))), {}),
    "outputs that grow apart": (output(1, 3, 3.0), {}),
    "an expert with few tokens": (output(1, 3, 0, 5), {}),
    "experts that grow apart": (scaled(WEIGHT, 2.5, "experts.text.0.", "experts.image.3."), {}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_twin_is_not_accused(name: str) -> None:
    change, changes = HEALTHY[name]
    assert hints(change, **changes) == {}


def test_routers_with_nothing_to_decide_need_no_gradient() -> None:
    groups = draw_groups(2, num_experts=1, num_null=0, top_k=1)
    placement, watch, rng = draw_placement(groups, 1), HintWatch(groups, LAYERS), np.random.default_rng(0)
    for step in (25, 50):
        table = draw(rng, scaled(GRADIENT, 0, ".router."))
        record = record_of(draw_statistics(placement, len(LAYERS), step, weights=table), placement, MODALITIES)
        assert not [hint for hint in watch.update(record) if hint.kind.startswith("untrained")]
