"""Makes hints from the routing counts of a window of steps. Each rule compares a load with the possible loads.

A token takes an expert at most once. The load of an expert is therefore at most the number of the group's tokens. If the
group has m null experts, at most min(k, m) of a token's k choices are null. Layers and experts with fewer than `ENOUGH`
expected choices are not judged. Shape letters are as in `metrics.py`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_dist.monitor.metrics import GroupChoices, divide, group_choices
from moe_dist.placement.placement import ExpertGroup

BUSY_EXPERT = 3.0  # an expert is busy if its load is at least this many times the even load
BUSY_SPAN = 0.8  # it is also busy if its load is this fraction of the way from the even to the largest possible load
BUSY_ROOM = 1.5  # an expert is judged only if its largest possible load is at least this many times the even load
DROPPED = 0.1  # a hint warns, and few_drops fails, if a capacity drops at least this fraction of a layer's pairs
NULL_EDGE = 0.02  # a hint warns if the null fraction is closer than this to 0 or to its largest possible value
IDLE = 0.02  # a layer is dead if its tokens take fewer experts than this many times the even number
STARVED = 0.1  # a group is starved if its tokens take fewer experts than this many times the even number
ENOUGH = 20.0  # with fewer expected choices, an unusual number may be due to chance
NAMED = 4  # largest number of experts or layers that a hint names


@dataclass(frozen=True)
class Hint:
    """One warning. If its `kind` equals that of an earlier hint, it is a repeat."""

    kind: str
    text: str


class WindowSums(NamedTuple):
    """Sums of `Record.arrays` over a window of steps, int64, and two numbers for the texts of hints."""

    choices_LC: np.ndarray
    tokens_LG: np.ndarray
    dropped_LG: np.ndarray
    steps: int
    balance_coefficient: float


@dataclass(frozen=True)
class GroupWindow:
    """The part of `WindowSums` that belongs to one group."""

    group: ExpertGroup
    choices: GroupChoices
    tokens_L: np.ndarray
    dropped_L: np.ndarray
    moe_layers: Sequence[int]
    steps: int
    balance_coefficient: float

    @property
    def kept(self) -> np.ndarray:
        """Returns each layer's number of (token, true expert) pairs that were not dropped by a capacity, int64 [L]."""
        return self.choices.true_Ln.sum(1) - self.dropped_L

    @property
    def even(self) -> np.ndarray:
        """Each layer's number of (token, true expert) pairs if all columns were chosen equally often, float64 [L]."""
        return self.tokens_L * self.group.expected_experts_per_token

    @property
    def saturated(self) -> float:
        """Returns the largest fraction of choices that can be null."""
        return min(self.group.top_k, self.group.num_null) / self.group.top_k

    @property
    def null_share(self) -> float | None:
        """Returns the fraction of choices that are null, over all layers. None without choices or null experts."""
        total = float(self.choices.total.sum())
        return float(self.choices.null_Lm.sum()) / total if total and self.group.num_null else None


def for_another_trainer(text: str) -> str:
    """Returns a hint's text for a model that another trainer trains. There, settings have other names."""
    coefficient = r"( first)? coefficient in loss\.balance\.schedule( \(now \S+\))?"
    text = re.sub(coefficient, " weight of the load-balancing loss (router_aux_loss_coef, moe_aux_loss_coeff)", text)
    text = re.sub("try placement.policy=.*", "spread the experts over the ranks", text)
    return text.replace("optimizer.", "").replace("model.moe.capacity.factor", "capacity factor")


def routing_hints(sums: WindowSums, groups: Sequence[ExpertGroup], moe_layers: Sequence[int]) -> Iterator[Hint]:
    """Yields the hints that any rule gives for any group."""
    for g, (group, choices) in enumerate(zip(groups, group_choices(sums.choices_LC, groups), strict=True)):
        tokens_L, dropped_L = sums.tokens_LG[:, g], sums.dropped_LG[:, g]
        window = GroupWindow(group, choices, tokens_L, dropped_L, moe_layers, sums.steps, sums.balance_coefficient)
        if not tokens_L.any():
            if sums.tokens_LG.any():
                yield no_tokens(window)
            continue
        for rule in (busy_expert, dead_experts, dead_layers, dropped_pairs, null_limits, few_experts):
            yield from rule(window)


def busy_expert(window: GroupWindow) -> Iterator[Hint]:
    """Warns if an expert of a layer takes several times the even load, or nearly the largest possible load."""
    group, true_Ln = window.group, window.choices.true_Ln
    even_L, most_L = true_Ln.mean(1), window.tokens_L
    limit_L = np.minimum(BUSY_EXPERT * even_L, even_L + BUSY_SPAN * (most_L - even_L))
    judged_L = (even_L >= ENOUGH) & (most_L >= BUSY_ROOM * even_L)
    over_L = np.where(judged_L, divide(true_Ln.max(1), limit_L), 0.0)
    if over_L.max() < 1:
        return
    layer = int(over_L.argmax())
    expert = int(true_Ln[layer].argmax())
    name = group.name
    yield Hint(
        f"busy/{name}",
        f"{busy_text(group, true_Ln, window.tokens_L, window.moe_layers, layer, expert)}; see moe/load/{name} in "
        f"TensorBoard; try a larger coefficient in loss.balance.schedule (now {window.balance_coefficient:g})",
    )


def busy_text(
    group: ExpertGroup, true_Ln: np.ndarray, tokens_L: np.ndarray, moe_layers: Sequence[int], layer: int, expert: int
) -> str:
    """Returns a text for hints and reports: an expert's load compared with the group's tokens and with the mean load."""
    load, mean = true_Ln[layer, expert], true_Ln[layer].mean()
    return (
        f"{group.name} expert {expert} takes {load / tokens_L[layer]:.0%} of its group's tokens in layer "
        f"{moe_layers[layer]}, {load / mean:.3g} x the mean expert ({100 * mean / tokens_L[layer]:.2g}%)"
    )


def dead_experts(window: GroupWindow) -> Iterator[Hint]:
    """Warns about experts that no token chose, in layers whose other experts were chosen (else `dead_layers` warns)."""
    true_Ln = window.choices.true_Ln
    dead = np.argwhere((true_Ln == 0) & (true_Ln.mean(1, keepdims=True) >= ENOUGH))
    if not len(dead):
        return
    names = named_few([f"{expert} (layer {window.moe_layers[layer]})" for layer, expert in dead])
    yield Hint(
        f"dead/{window.group.name}",
        f"{window.group.name} expert{'s' if len(dead) > 1 else ''} {names} took no token in the last {window.steps} steps; "
        f"see moe/load/{window.group.name} in TensorBoard; try a larger first coefficient in loss.balance.schedule, "
        "or fewer experts",
    )


def dead_layers(window: GroupWindow) -> Iterator[Hint]:
    """Warns about layers that compute hardly any (token, expert) pair of the group although other layers do."""
    # A layer that has no tokens of the group is judged as if it had the mean number of tokens over layers.
    even_L = np.maximum(window.even, window.even.mean() * (window.tokens_L == 0))
    dead_L = (window.kept < IDLE * even_L) & (even_L >= ENOUGH)
    dead = np.flatnonzero(dead_L).tolist()
    if not dead or dead_L.all():
        return
    layers = named_few([str(window.moe_layers[layer]) for layer in dead])
    kept = window.kept[dead].sum() / max(1, window.tokens_L[dead].sum())
    yield Hint(
        f"layer/{window.group.name}",
        f"layer{'s' if len(dead) > 1 else ''} {layers} compute{'' if len(dead) > 1 else 's'} nearly nothing for the "
        f"{window.group.name} group: {kept:.2f} true experts per token (even: {window.group.expected_experts_per_token:.2f}"
        "); see moe/null_fraction and moe/dropped_fraction in TensorBoard; try a larger coefficient in "
        "loss.balance.schedule",
    )


def dropped_pairs(window: GroupWindow) -> Iterator[Hint]:
    """Warns if a capacity drops many of a layer's (token, expert) pairs."""
    true_Ln, dropped_L = window.choices.true_Ln, window.dropped_L
    share_L = np.where(true_Ln.sum(1) >= ENOUGH, np.nan_to_num(divide(dropped_L, true_Ln.sum(1))), 0.0)
    layer = int(share_L.argmax())
    if share_L[layer] < DROPPED:
        return
    used_L = np.nan_to_num(divide(true_Ln.max(1), window.even / window.group.num_experts))  # the same as moe/capacity_used
    fullest = int(used_L.argmax())
    yield Hint(
        f"dropped/{window.group.name}",
        f"model.moe.capacity drops {dropped_L.sum() / true_Ln.sum():.0%} of the {window.group.name} group's (token, "
        f"expert) pairs, {share_L[layer]:.0%} in layer {window.moe_layers[layer]}; the busiest expert "
        f"(layer {window.moe_layers[fullest]}) takes {used_L[fullest]:.2f} x an even share of all choices; see "
        f"moe/dropped_fraction in TensorBoard; try a larger model.moe.capacity.factor, or "
        f"a larger coefficient in loss.balance.schedule (now {window.balance_coefficient:g})",
    )


def null_limits(window: GroupWindow) -> Iterator[Hint]:
    """Warns if the fraction of null choices is close to 0 or to its largest possible value."""
    share, group = window.null_share, window.group
    if share is None:
        return
    even = group.num_null / group.num_columns
    if share > window.saturated - min(NULL_EDGE, (window.saturated - even) / 10):
        what, cost = "almost all possible", "hardly any token reaches an expert by choice"
    elif share < min(NULL_EDGE, even / 10):
        what, cost = "almost none", "null experts save nothing"
    else:
        return
    yield Hint(
        f"null/{group.name}",
        f"{what} of the {group.name} group's choices are null ({share:.1%}; even: {even:.0%}; possible: 0% to "
        f"{window.saturated:.0%}): {cost}; see moe/null_fraction in TensorBoard; try a larger coefficient in "
        "loss.balance.schedule",
    )


def few_experts(window: GroupWindow) -> Iterator[Hint]:
    """Warns if a group's tokens get hardly any true expert, over all layers and after null choices and drops."""
    share, group = window.null_share, window.group
    per_token, even = float(window.kept.sum() / window.tokens_L.sum()), group.expected_experts_per_token
    saturated = share is not None and share > 1 - NULL_EDGE  # `null_limits` warns instead
    if saturated or per_token >= STARVED * even or window.even.sum() < ENOUGH:
        return
    yield Hint(
        f"starved/{group.name}",
        f"tokens of the {group.name} group get {per_token:.2f} true experts (even: {even:.2f}); "
        "see moe/experts_per_token in TensorBoard; try a larger coefficient in loss.balance.schedule, or a larger "
        "model.moe.capacity.factor",
    )


def no_tokens(window: GroupWindow) -> Hint:
    """Returns the warning about a group of which no token was routed."""
    name = window.group.name
    return Hint(
        f"starved/{name}",
        f"no token was routed in the {name} group in the last {window.steps} steps; if the group shall be trained, look at "
        "the mix in data",
    )


def named_few(names: Sequence[str]) -> str:
    """Returns the first names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
