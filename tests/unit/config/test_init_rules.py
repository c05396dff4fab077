"""If null rows are copies of true rows, only some k leave a model unchanged. The formula for these k agrees with brute
force, and any other k is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.init_rules import identity_choices, source_problems
from moe_dist.config.load import rule_violations
from moe_dist.config.model_schema import ModelSection
from tests.reference.layer import choose
from tests.support.tiny import tiny_config

TRAINED: dict[str, Any] = {
    "model.moe.groups.text.num_null": 0,
    "model.moe.groups.text.top_k": 2,
    "model.moe.groups.image.num_null": 0,
    "model.moe.groups.image.top_k": 1,
}
HERE = {
    "run.init_from": "runs/trained", "run.init_rules": ["copy_nulls"], "model.moe.groups.text.num_null": 3,
    "model.moe.groups.text.top_k": 4, "model.moe.groups.image.num_null": 4, "model.moe.groups.image.top_k": 3,
}  # fmt: skip


@pytest.mark.parametrize(("n", "t", "k0"), list(itertools.product(range(1, 5), range(4), range(1, 5))))
def test_the_range_is_what_brute_force_finds(n: int, t: int, k0: int) -> None:
    """A k is in the range if for every order of the true experts' logits exactly the best k0 true experts are taken."""
    if k0 > n:
        return
    good = []
    for k in range(1, n * (t + 1) + 1):
        taken = (
            {column for column in choose([*order] * (t + 1), n, k) if column < n}
            == {column for column in choose(list(order), n, k0)}
            for order in itertools.permutations([float(i) for i in range(n)])
        )
        if all(taken):
            good.append(k)
    assert good == list(identity_choices(n, t * n, k0))


def config(tmp_path: Path, **changes: Any) -> Any:
    return tiny_config(tmp_path, tmp_path, {**HERE, **{key.replace("__", "."): value for key, value in changes.items()}})


def source(tmp_path: Path, **changes: Any) -> ModelSection:
    keys = {f"model.moe.{key.replace('__', '.')}": value for key, value in changes.items()}
    return tiny_config(tmp_path, tmp_path, {**TRAINED, **keys}).model


def test_a_trained_top_k_model_passes(tmp_path: Path) -> None:
    assert not list(rule_violations(config(tmp_path)))
    assert source_problems(config(tmp_path), source(tmp_path)) == []
    assert source_problems(config(tmp_path), source(tmp_path, router={"normalise": "all_chosen"})) == []
    plain = config(tmp_path, model__moe__router={"normalise": "true_all"})
    assert source_problems(plain, source(tmp_path, router={"normalise": "none"})) == []
    (problem,) = source_problems(plain, None)
    assert "does not say by which router it was trained" in problem


@pytest.mark.parametrize(
    ("here", "trained", "fault"),
    [
        ({}, {"router": {"kind": "group_limited"}}, "with a router of kind group_limited copies of true rows change"),
        ({}, {"router": {"selection_bias": True}}, "chooses by softmax + bias"),
        ({}, {"router": {"logit_bias": True}}, "biased logits, and null experts have none"),
        ({}, {"router": {"normalise": "none"}}, "model.moe.router.normalise=true_chosen: the weights of the checkpoint's "
         "none come from true experts only, because it has no null experts; take true_all"),
        ({}, {"router": {"scale": 2.5}}, "model.moe.router.scale=1: the checkpoint has scale=2.5; take it"),
        ({}, {"groups__text__top_k": 1}, "model.moe.groups.text.top_k=4: with num_null=3 copies of 3 true rows, a token "
         "takes the checkpoint's 1 true experts only for top_k from 1 to 2; take one of these, or another num_null"),
        ({"model__moe__groups__image__top_k": 4}, {}, "image.top_k=4: with num_null=4 copies of 2 true rows"),
        ({}, {"groups__text__num_experts": 4}, "model.moe.groups.text.num_experts=3: the checkpoint has 4"),
        ({}, {"groups__text__num_null": 3}, "has null or zero-computation experts already"),
        ({}, {"groups": {"all": {"num_experts": 2, "top_k": 1, "ffn_dim": 8}}},
         "the checkpoint has no such group; it has all"),
    ],
)  # fmt: skip
def test_what_would_not_begin_as_it_was_is_refused(
    tmp_path: Path, here: dict[str, Any], trained: dict[str, Any], fault: str
) -> None:
    assert any(fault in each for each in source_problems(config(tmp_path, **here), source(tmp_path, **trained)))
