"""Planted faults of training get a hint that names the cause, and healthy twins get none. Each step is drawn.

Shape letters: D ranks that read different data, C columns, L layers.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_dist.monitor.hints import HintWatch
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.statistics import EvaluationResult
from tests.unit.monitor.conftest import MODALITIES, draw_groups, draw_placement, draw_statistics, record_of

GROUPS, RANKS, LAYERS, BEGIN = draw_groups(2, num_experts=8, num_null=4, top_k=2), 4, 3, 60  # BEGIN: first faulty step
JUDGED = ("loss", "spike", "logits", "gradient", "overfit", "router", "repeats", "data", "skipped", "source", "pays")
JUDGED += ("unequal", "words")
WORDS_K = np.arange(1, 62) ** -1.0  # frequencies of token ids, as of words
Change = Callable[[int, dict[str, Any], np.random.Generator], None]


def usual(step: int, rng: np.random.Generator) -> dict[str, Any]:
    """Returns a healthy step: losses and gradient fall with noise, and each rank reads different batches."""
    labels_M = np.array([300, 200])
    level = 2 + 6 * math.exp(-step / 40)
    loss_D = level * rng.normal(1, 0.03, RANKS)
    digest_D = rng.integers(1, 1 << 48, RANKS)
    return {
        "labels_M": labels_M,
        "nll_M": level * labels_M * rng.normal(1, 0.03, 2),
        "grad_norm": (0.5 + 3 * math.exp(-step / 20)) * rng.lognormal(0, 0.3),
        "z": 0.004 * rng.lognormal(0, 0.1),
        "data_D3": np.stack([digest_D, loss_D * 125, np.full(RANKS, 125)], axis=1),
        "total_D": loss_D / RANKS,
        "words_DK": np.random.default_rng(step).multinomial(500, WORDS_K / WORDS_K.sum(), RANKS),
        "epochs": {name: 0.001 * step for name in MODALITIES},
        "sources_S2": np.stack([np.maximum(level * rng.normal(1, 0.03, 3), [1.5, 2.5, 1.0]), np.ones(3)], axis=1) * 200,
        "sources": ("books", "web", "code"),
    }


def hints(change: Change, *, steps: int = 120, held_out: Callable[[int], Any] = lambda _: 0.0) -> list[tuple[int, Hint]]:
    """Simulates a run that `change` alters. Returns the hints about training, each with its step. A healthy run's held-out
    loss falls with the training loss; `held_out` returns what is added to it after a step, for all or for each modality."""
    rng, placement = np.random.default_rng(0), draw_placement(GROUPS, RANKS)
    watch, said = HintWatch(GROUPS, (1, 2, 3)), []
    for step in range(1, steps + 1):
        changes = usual(step, rng)
        drawn = draw_statistics(placement, LAYERS, step).result.counts
        changes |= {"choices_LC": drawn.choices_LC, "tokens_LG": drawn.tokens_LG, "entropy_LG": drawn.entropy_LG}
        change(step, changes, rng)
        record = record_of(draw_statistics(placement, LAYERS, step, **changes), placement, MODALITIES)
        said += [(step, hint) for hint in watch.update(record)]
        if step % 20 == 0:
            more_M = np.broadcast_to(held_out(step), 2)
            losses = {name: 2 + 6 * math.exp(-step / 40) + more for name, more in zip(MODALITIES, more_M, strict=True)}
            said += [(step, hint) for hint in watch.evaluate(EvaluationResult(step, losses, dict.fromkeys(losses, 500)))]
    return [(step, hint) for step, hint in said if hint.kind.partition("/")[0] in JUDGED]


def healthy(*_: Any) -> None:
    """Changes nothing."""


def random_tokens(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    if step >= BEGIN and step % 7 == 0:
        changes["nll_M"] = np.array([9.0 * 300, changes["nll_M"][1]])


def rises(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["nll_M"] = changes["nll_M"] * 1.03 ** max(0, step - BEGIN)


def logits_grow(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["z"] *= 1.15 ** max(0, step - BEGIN)
    changes["grad_norm"] *= 1.2 ** max(0, step - BEGIN)


def gradient_grows(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["grad_norm"] *= 1.15 ** max(0, step - BEGIN)


def data(rank: int, value: Callable[[int, np.ndarray], float], column: int = 0) -> Change:
    def change(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
        if step >= BEGIN:
            changes["data_D3"][rank, column] = value(step, changes["data_D3"])

    return change


def scaled(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["total_D"][3] *= 64 if step >= BEGIN else 1


def shifted(_: int, changes: dict[str, Any], __: np.random.Generator) -> None:
    """As by a tokenizer of another version."""
    changes["words_DK"][2] = np.roll(changes["words_DK"][2], 1)


def same(equal: bool) -> Change:
    """All tokens of layer 2 take the first two image experts."""

    def change(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
        if step >= BEGIN:
            tokens = changes["tokens_LG"][1, 1]
            changes["choices_LC"][1, [*range(8, 16), *range(20, 24)]] = [tokens, tokens, *[0] * 10]
            changes["entropy_LG"][1, 1] = tokens * (math.log(12) if equal else 0.1)

    return change


def source(first: int, loss: float, *which: int) -> Change:
    """From step `first` on, sources have another loss."""

    def change(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
        for each in which if step >= first else ():
            changes["sources_S2"][each, 0] = loss * rng.normal(1, 0.03) * 200

    return change


def image_rises(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["nll_M"][1] = (3 + 0.02 * step) * changes["labels_M"][1]


def nan_router(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    same(False)(step, changes, rng)  # nan chooses the first experts
    if step >= BEGIN:
        changes["entropy_LG"][1:] = np.nan
        changes |= {"skipped": True, "grad_norm": math.nan}


def flat(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    changes["nll_M"] = 8.3 * changes["labels_M"] * rng.normal(1, 0.003, 2)


# Name -> (change of a step, what is added to the held-out loss, kind of hint, words in its text, last step)
FAULTS: dict[str, tuple[Change, Callable[[int], Any], str, str, int]] = {
    "corrupt batches": (random_tokens, lambda _: 0, "spike/text", "look at the data that these steps read (steps ", 90),
    "the loss rises": (rises, lambda _: 0, "loss", "the loss rose from ", 120),
    "random labels": (flat, lambda _: 0, "loss", "can a label be told from its inputs?", 100),
    "router logits grow": (logits_grow, lambda _: 0, "logits", "try a larger loss.z", 82),
    "the gradient grows": (gradient_grows, lambda _: 0, "gradient", "try a lower optimizer.lr or optimizer.clip_norm", 85),
    "overfit": (healthy, lambda step: 0.06 * max(0, step - 40), "overfit/text", "while the training loss fell", 80),
    "learnt by heart": (healthy, lambda _: 9.0, "overfit/image", "the model learns its data by heart", 20),
    "a rank repeats a batch": (data(1, lambda *_: 7), lambda _: 0, "repeats", "rank 1 reads the same batches of its ", 65),
    "a rank reads another's data": (data(3, lambda _, d: d[1, 0]), lambda _: 0, "repeats", "batches that rank 1 reads", 65),
    "a rank cycles": (data(2, lambda step, _: step % 9 + 1), lambda _: 0, "repeats", "rank 2 reads", 75),
    "a rank's data are corrupt": (data(2, lambda *_: 9 * 125, 1), lambda _: 0, "data", "rank 2 has a loss of 8.9", 95),
    "a rank scales its loss": (scaled, lambda _: 0, "unequal", "the loss of rank 3 enters the gradient 64 x as", 70),
    "a rank has another tokenizer": (shifted, lambda _: 0, "words", "rank 2 reads other token ids", 30),
    "a source turns corrupt": (source(BEGIN, 9, 1), lambda _: 0, "source/web", "the loss of source web rose from ", 75),
    "a source was never sane": (source(1, 8.1, 2), lambda _: 0, "source/code", "source code does not fall: ", 50),
    "images pay for text": (image_rises, lambda step: (0, 0.2 * step), "pays/image", "image pays for text: since", 80),
    "a router of zeros": (same(True), lambda _: 0, "router/image", "layer 2 gives all tokens the same scores", 70),
    "a constant router": (same(False), lambda _: 0, "router/image", "layer 2 ranks the experts in the same order", 70),
    "a router of nan": (nan_router, lambda _: 0, "skipped", "the router of layer 2 is the first with scores", 60),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    change, held_out, kind, words, last = FAULTS[name]
    found = [(step, hint.text) for step, hint in hints(change, held_out=held_out) if hint.kind == kind]
    assert found, "the fault is not named"
    assert words in found[0][1]
    assert found[0][0] <= last


def test_a_router_of_nan_is_called_nothing_else() -> None:
    assert {hint.kind for _, hint in hints(nan_router)} == {"skipped"}


def noisy(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    changes["nll_M"] = changes["nll_M"] * rng.lognormal(0, 0.1, 2)
    changes["data_D3"][:, 1] *= rng.lognormal(0, 0.15, RANKS)
    changes["grad_norm"] *= rng.lognormal(0, 0.6)


def one_odd_batch(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    if step == 80:
        changes |= {"nll_M": 9.0 * changes["labels_M"], "grad_norm": 60.0, "z": 0.5}


def fast(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["nll_M"] = changes["nll_M"] * (1 + 3 * math.exp(-step / 5))
    changes["grad_norm"] = 0.05 * min(step, 40)  # like a warm-up from zero


def alternating(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    """Text and image batches take turns, and their losses differ."""
    other, few = (0, 1)[:: 1 if step % 10 == 0 else -1], np.array([1.0, 0.8])
    changes["labels_M"] = np.where(np.arange(2) == other[0], 500, 0)
    changes["nll_M"] = changes["nll_M"] * few * np.where(changes["labels_M"], 500 / np.array([300, 200]), 0)


def small_data(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes["data_D3"][:, 0] = step % 4 + 10 * np.arange(1, RANKS + 1)
    changes["epochs"] = dict.fromkeys(MODALITIES, step / 4)


def first_records(step: int, changes: dict[str, Any], _: np.random.Generator) -> None:
    changes |= {"data_D3": np.zeros((0, 3)), "total_D": np.zeros(0), "words_DK": np.zeros((0, 0))}


def a_new_stage(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    """The data of all sources change."""
    source(BEGIN, 5, 0, 1, 2)(step, changes, rng)


def a_rare_source(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    """Most steps have no label of it, and its noise is large."""
    changes["sources_S2"][1] = [200 * rng.lognormal(1, 0.5), 200] if step % 3 == 0 else [0, 0]


def a_known_source(step: int, changes: dict[str, Any], rng: np.random.Generator) -> None:
    """In fine-tuning, a source of pretraining keeps its loss."""
    source(1, 1.5, 0)(step, changes, rng)


ODD = [a_new_stage, a_rare_source, a_known_source]


@pytest.mark.parametrize("change", [*ODD, healthy, noisy, one_odd_batch, fast, alternating, small_data, first_records])
def test_a_healthy_twin_is_not_accused(change: Change) -> None:
    assert hints(change, held_out=lambda step: 0.2 + 0.05 * (step % 40 == 0)) == []
