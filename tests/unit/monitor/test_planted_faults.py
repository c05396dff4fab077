"""Planted faults get their hint within 100 steps, and healthy runs get no hint. A simulated router draws each token's
choices.

Shape letters: L MoE layers, C columns of a group, T tokens of a group, n true experts of a group.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

import numpy as np
import pytest

from moe_dist.monitor.hints import Hint, HintWatch
from moe_dist.monitor.metrics import Record
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.unit.monitor.conftest import draw_groups, draw_placement, draw_statistics, record_of


@dataclass(frozen=True)
class Run:
    """A run to simulate. `bias` changes a group's preferences [L, C] in place. `stops` names modalities without data."""

    groups: tuple[ExpertGroup, ...] = field(default_factory=lambda: draw_groups(2, num_experts=8, num_null=4, top_k=2))
    layers: int = 4
    ranks: int = 4
    tokens: tuple[int, ...] = (96, 96)
    skew: float = 0.3  # standard deviation of the preferences for columns
    factor: float | None = None  # capacity factor
    pinned: bool = False
    bias: Mapping[str, Callable[[np.ndarray], None]] = field(default_factory=dict)
    stops: tuple[str, ...] = ()

    def placement(self) -> ExpertPlacement:
        if not self.pinned:
            return draw_placement(self.groups, self.ranks)
        half = len(self.groups[0].experts) // 2  # each of the two groups is on two ranks
        experts = [tuple(part) for group in self.groups for part in (group.experts[:half], group.experts[half:])]
        return ExpertPlacement(self.groups, tuple(experts))


def choose(preference_LC: np.ndarray, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how many tokens have each column in their top k, int64 [L, C]. Gumbel noise makes each token's order
    random."""
    noise_LTC = rng.gumbel(size=(len(preference_LC), tokens, preference_LC.shape[1])).astype(np.float32)
    chosen_LTk = np.argpartition(-(preference_LC[:, None] + noise_LTC), top_k - 1, axis=2)[:, :, :top_k]
    columns = preference_LC.shape[1]
    return np.stack([np.bincount(chosen.ravel(), minlength=columns) for chosen in chosen_LTk])


def records(run: Run, steps: int, seed: int = 0) -> Iterator[Record]:
    rng, placement = np.random.default_rng(seed), run.placement()
    preferences = []
    for group in run.groups:
        preference_LC = rng.normal(0, run.skew, (run.layers, group.num_columns))
        run.bias.get(group.name, lambda _: None)(preference_LC)
        preferences.append(preference_LC)
    for step in range(1, steps + 1):
        chosen, dropped = [], []
        tokens = [0 if group.name in run.stops else count for group, count in zip(run.groups, run.tokens, strict=True)]
        for group, preference_LC, count in zip(run.groups, preferences, tokens, strict=True):
            chosen.append(choose(preference_LC, count, group.top_k, rng))
            even = group.top_k * count / group.num_columns
            most = count if run.factor is None else ceil(run.factor * even)
            dropped.append(np.maximum(chosen[-1][:, : group.num_experts] - most, 0))
        true = [part[:, : group.num_experts] for part, group in zip(chosen, run.groups, strict=True)]
        null = [part[:, group.num_experts :] for part, group in zip(chosen, run.groups, strict=True)]
        modalities = [group.name for group in run.groups]
        labels_M = np.array(tokens)
        stats = draw_statistics(
            placement,
            run.layers,
            step,
            choices_LC=np.concatenate([*true, *null], axis=1),
            tokens_LG=np.tile(tokens, (run.layers, 1)),
            dropped_LE=np.concatenate(dropped, axis=1),
            labels_M=labels_M,
            nll_M=5.0 * 0.99**step * labels_M,
        )
        read = {name: 0.0 if name in run.stops else 0.1 * step for name in modalities}
        yield record_of(stats._replace(loop={**stats.loop, "epochs": read}), placement, modalities)


def hints(run: Run, steps: int = 100) -> list[Hint]:
    watch = HintWatch(run.groups, range(run.layers))
    return [hint for record in records(run, steps) for hint in watch.update(record)]


def towards(columns: slice, by: float, layers: slice = slice(None)) -> Callable[[np.ndarray], None]:
    def bias(preference_LC: np.ndarray) -> None:
        preference_LC[layers, columns] += by

    return bias


HALF = (ExpertGroup("text", 8, 0, 4, 32, 0, ("text",)),)  # each token takes half of the experts
ENOUGH_NULLS = draw_groups(2, num_experts=8, num_null=8, top_k=2)

FAULTS: dict[str, tuple[Run, str, str]] = {
    "collapse": (Run(bias={"image": towards(slice(3, 4), 9)}), "busy/image", "image expert 3 takes 100% of"),
    "collapse, half of the experts": (
        Run(HALF, tokens=(96,), bias={"text": towards(slice(0, 4), 9, slice(2, 3))}),
        "busy/text",
        "takes 100% of its group's tokens in layer 2, 2 x the mean expert (50%)",
    ),
    "one dead expert": (Run(bias={"text": towards(slice(2, 3), -50, slice(1, 2))}), "dead/text", "text expert 2 (layer 1)"),
    "one dead layer": (
        Run(ENOUGH_NULLS, bias={"text": towards(slice(8, 16), 50, slice(3, 4))}),
        "layer/text",
        "layer 3 computes nearly nothing for the text group: 0.00 true experts per token (even: 1.00)",
    ),
    "a modality without data": (Run(stops=("image",)), "starved/image", "no token was routed in the image group"),
    "a modality without experts": (
        Run(ENOUGH_NULLS, bias={"image": towards(slice(8, 16), 3.5)}),
        "starved/image",
        "tokens of the image group get 0.0",
    ),
    "drops": (Run(skew=1.5, factor=1.0), "dropped/text", "model.moe.capacity drops "),
    "ranks uneven": (
        Run(tokens=(180, 12), pinned=True),
        "rank",
        "of the EP group computes most rows, and the busiest rank of a layer computes 1.9 x",
    ),
    "nulls saturated": (
        Run(ENOUGH_NULLS, bias={"text": towards(slice(8, 16), 50)}),
        "null/text",
        "almost all possible of the text group's choices are null (100.0%; even: 50%; possible: 0% to 100%)",
    ),
    "nulls saturated, fewer than choices": (
        Run(draw_groups(2, 8, 1, 2), bias={"text": towards(slice(8, 9), 50)}),
        "null/text",
        "(50.0%; even: 11%; possible: 0% to 50%)",
    ),
    "a null router asleep": (Run(bias={"image": towards(slice(8, 12), -50)}), "null/image", "almost none of the image"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_within_100_steps(name: str) -> None:
    run, kind, words = FAULTS[name]
    texts = [hint.text for hint in hints(run, steps=60) if hint.kind == kind]
    assert texts, "the fault is not named"
    assert words in texts[0]


def wide(experts: int, nulls: int, top_k: int, layers: int, tokens: int) -> Run:
    return Run(draw_groups(1, experts, nulls, top_k), layers=layers, ranks=8, tokens=(tokens,))


HEALTHY: dict[str, Run] = {
    "two groups with nulls": Run(),
    "half of the experts": Run(HALF, tokens=(96,)),
    "all but one of the experts": Run((ExpertGroup("text", 8, 0, 7, 32, 0, ("text",)),), tokens=(48,)),
    "one choice, Switch": Run(draw_groups(1, 16, 0, 1), tokens=(512,), skew=0.2),
    "capacity factor 1.5": Run(factor=1.5, skew=0.15, tokens=(384, 384)),
    "one null expert among many": Run((ExpertGroup("text", 60, 1, 2, 32, 0, ("text",)),), tokens=(256,)),
    "as many nulls, pinned": Run(ENOUGH_NULLS, pinned=True, tokens=(110, 80)),
    "two experts": Run(draw_groups(2, 2, 0, 1), ranks=2),
    "64 experts, 48 layers": wide(64, 16, 6, layers=48, tokens=64),
    "256 experts": wide(256, 0, 8, layers=12, tokens=96),
    "four groups, an unequal mix": Run(draw_groups(4, 8, 8, 3), tokens=(160, 120, 24, 12)),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.slow
def test_a_healthy_run_is_not_accused(name: str) -> None:
    assert hints(HEALTHY[name], steps=60) == []
