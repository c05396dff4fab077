"""Defines the methods of `moe-dist compare-methods`. A method changes a configuration so that the mean number of true (not
null) experts per token has a given value, called the budget.

The following rules apply to all methods. Groups keep their numbers of true experts. Softmax weights that are not normalised
are scaled: with a uniform router, the weights of a token with the budget's number of experts sum to 1. The positive logits
of `remoe` are scaled in the same way, although they are not probabilities. Sigmoid weights of methods in which experts
choose tokens are not scaled. In methods with null experts, a group has as many null experts as true experts (except in
`single_null`). A controller has the rate RATE if its biases are added to probabilities. If its biases are added to logits,
it has the rate LOGIT_RATE, which is ten times RATE.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_schema import GroupSection
from moe_dist.config.schema import Config

Settings = dict[str, Any]
RATE = 1.0  # rate of controllers whose biases are added to probabilities
LOGIT_RATE = 10.0
DECAY_SHARE = 1.0  # fraction of the steps after which a controller's rate has halved; with 0.25 loads lag behind routers
WARMUP_SHARE = 0.1  # fraction of the steps in which experts compete for tokens, before thresholds replace the competition


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        about: Short description of the method, for the table.
        settings: Function of a base configuration and a budget. It returns the overrides of the base.
        refused: Function of a group and a budget. It returns the reason why the method cannot reach the budget; empty if
            the method can. The function may ignore cases that the rules of a configuration refuse.
    """

    about: str
    settings: Callable[[Config, float], Settings]
    refused: Callable[[GroupSection, float], str] = lambda group, budget: ""


def _groups(base: Config, **changes: Callable[[GroupSection], Any]) -> Settings:
    """Returns overrides that set some keys of each group."""
    return {
        f"model.moe.groups.{name}.{key}": value(group)
        for name, group in base.model.moe.groups.items()
        for key, value in changes.items()
    }


def _held(base: Config, budget: float, rate: float, per: str = "group") -> Settings:
    """Returns the override with a controller that keeps each group's number of true experts per token at the budget."""
    target = dict.fromkeys(base.model.moe.groups, budget)
    decay = max(1, round(DECAY_SHARE * base.train.steps))
    controller = {"kind": "active_experts", "target": target, "rate": rate, "decay_steps": decay, "per": per}
    return {"model.moe.balance": [controller]}


def _choices(budget: float) -> int:
    """Returns twice the budget, rounded up, for top_k. With as many null experts as true experts, about half of a token's
    choices are true experts."""
    return math.ceil(2.0 * budget)


def _null_weights(base: Config, budget: float) -> Settings:
    """Returns the override of the null weight w that leads to the budget: w = n (k - budget) / (m budget). Here k is
    top_k, n is the number of true experts, and m = n is the number of null experts."""
    weight = (_choices(budget) - budget) / budget
    return {"loss.balance.null_weight": dict.fromkeys(base.model.moe.groups, weight)}


def _adamoe(base: Config, budget: float) -> Settings:
    groups = _groups(base, num_null=lambda group: group.num_experts, top_k=lambda _: _choices(budget))
    return {**groups, **_null_weights(base, budget), "model.moe.router": {"kind": "top_k"}}


def _single_null(base: Config, budget: float) -> Settings:
    nulls = _groups(
        base,
        num_null=lambda group: round(group.num_experts * (_choices(budget) - budget) / budget),
        top_k=lambda _: _choices(budget),
    )
    return {**nulls, "loss.balance.kind": "vanilla", "model.moe.router": {"kind": "top_k", "null_logit": "single"}}


def _longcat(base: Config, budget: float) -> Settings:
    groups = _groups(base, num_identity=lambda group: group.num_experts, top_k=lambda _: _choices(budget))
    columns = 2.0 * max(group.num_experts for group in base.model.moe.groups.values())
    router = {"kind": "top_k", "normalise": "none", "selection_bias": True, "scale": columns / _choices(budget)}
    split = {"loss.balance.kind": "null_split"}
    return {
        **groups,
        **_null_weights(base, budget),
        **split,
        **_held(base, budget, RATE, "expert"),
        "model.moe.router": router,
    }


def _adaptive(kind: str, rate: float, *, scaled: bool = True) -> Callable[[Config, float], Settings]:
    def settings(base: Config, budget: float) -> Settings:
        experts = max(group.num_experts for group in base.model.moe.groups.values())
        router = {"kind": kind, **({"scale": experts / budget} if scaled else {})}
        every = _groups(base, top_k=lambda group: group.num_experts)
        return {**every, "loss.balance.kind": "vanilla", **_held(base, budget, rate), "model.moe.router": router}

    return settings


def _experts(**router: Any) -> Callable[[Config, float], Settings]:
    def settings(base: Config, budget: float) -> Settings:
        counts = {group.num_experts for group in base.model.moe.groups.values()}
        warmup = {"warmup_steps": max(1, round(WARMUP_SHARE * base.train.steps))}
        more = warmup if router["kind"] == "expert_threshold" else {}
        share = {"capacity": min(1.0, budget / max(counts))}
        off = {"loss.balance.schedule": [[0, 0.0]], "loss.z": 0.0}
        return {**off, "model.moe.router": {**router, **share, **more, "causal": "threshold"}}

    return settings


def unnormalised(base: Config, budget: float) -> Settings:
    """Returns the settings of a router whose weights are a softmax over all experts. With a softmax over the chosen
    experts, a single expert would have the weight 1, and the router would get no gradient."""
    return {"normalise": "none", "scale": max(group.num_experts for group in base.model.moe.groups.values()) / budget}


def _fixed(base: Config, budget: float) -> Settings:
    loads = {name: [budget] * len(base.model.moe_layers) for name in base.model.moe.groups}
    groups = _groups(base, top_k=lambda _: math.ceil(budget))
    router = {"kind": "scheduled_top_k", "active_experts": loads, **unnormalised(base, budget)}
    return {**groups, "model.moe.router": router}


def _top_k(base: Config, budget: float) -> Settings:
    groups = _groups(base, top_k=lambda _: round(budget))
    return {**groups, "model.moe.router": {"kind": "top_k", **unnormalised(base, budget)}}


def _needs_room(group: GroupSection, budget: float) -> str:
    return f"{budget:g} is above half of the {group.num_experts} experts" if 2.0 * budget > group.num_experts else ""


def _needs_whole_nulls(group: GroupSection, budget: float) -> str:
    nulls = group.num_experts * (_choices(budget) - budget) / budget
    if abs(nulls - round(nulls)) > 1e-6:
        return f"{budget:g} needs {nulls:.2f} null experts beside {group.num_experts} true ones, which is no whole number"
    return _needs_room(group, budget)


def _needs_equal(group: GroupSection, budget: float) -> str:
    return f"{budget:g} is above {group.num_experts} experts" if budget > group.num_experts else ""


def _whole(group: GroupSection, budget: float) -> str:
    return "" if budget == round(budget) else f"each token takes a whole number of experts, and {budget:g} is none"


METHODS: Mapping[str, Method] = {
    "fixed": Method("fixed number, the fraction by a random draw", _fixed),
    "top_k": Method("the same number for each token", _top_k, _whole),
    "adamoe": Method("null experts, held by the balance loss", _adamoe, _needs_room),
    "single_null": Method("null experts with one logit, vanilla balance loss", _single_null, _needs_whole_nulls),
    "longcat": Method("identity experts, biases for each expert", _longcat, _needs_room),
    "top_p": Method("probabilities up to a held p", _adaptive("top_p", RATE)),
    "remoe": Method("positive logits, held by a bias", _adaptive("relu", LOGIT_RATE)),
    "dynmoe": Method("learned thresholds, held by a bias", _adaptive("threshold", RATE, scaled=False)),
    "predicted_k": Method("a linear head predicts the number", _adaptive("predicted_k", LOGIT_RATE)),
    "expert_choice": Method("experts choose in training", _experts(kind="expert_choice"), _needs_equal),
    "expert_threshold": Method("running thresholds of experts", _experts(kind="expert_threshold"), _needs_equal),
}
