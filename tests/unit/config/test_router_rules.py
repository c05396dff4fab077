"""Rules of expert choice for the rest of a configuration: errors name field, value, rule and fix, all at once."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.base.section import Violation
from moe_dist.config.routers.expert_choice import ExpertChoiceRouterSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.plan.planner import expected_plan
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.preflight import check
from tests.support.messages import refused
from tests.support.tiny import tiny_config

GROUPS = {
    "text": {"num_experts": 4, "top_k": 1, "ffn_dim": 16},
    "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24},
}
SOUND: dict[str, Any] = {
    "model.moe.groups": GROUPS,
    "model.moe.router": {"kind": "expert_choice", "causal": "threshold"},
    "loss.balance.schedule": [[0, 0.0]],
}
SECOND = {
    **SOUND,
    "model.moe.router": {"kind": "expert_choice", "causal": "auxiliary"},
    "train.only": "auxiliary_routers",
    "run.init_from": "runs/first",
}


def config(changes: dict[str, Any]) -> Config:
    return tiny_config(Path("none"), Path("runs"), changes)


def violations(run: Config) -> list[Violation]:
    return list(run.model.moe.router.violations_in(run))


SOFTMAX = {**SOUND, "model.moe.router": {"kind": "expert_choice", "causal": "threshold", "score": "softmax"}}


def of_capacity(**keys: Any) -> dict[str, Any]:
    return {**SOUND, "model.moe.router": {"kind": "expert_choice", "causal": "threshold", **keys}}


BY_GROUP = of_capacity(capacity={"image": 0.25}, capacity_schedule=[[0, 4.0], [9, 1.0]])


@pytest.mark.parametrize(
    "changes",
    [SOUND, SECOND, SOFTMAX, BY_GROUP, {}],
    ids=["threshold", "second stage", "softmax", "capacities", "token choice"],
)
def test_what_fits_passes(changes: dict[str, Any]) -> None:
    assert violations(config(changes)) == []


@pytest.mark.parametrize(
    ("changes", "text", "way_out"),
    [
        (
            {"loss.balance.schedule": [[0, 0.02]]},
            "loss.balance.schedule=[[0, 0.02]]: model.moe.router.kind=expert_choice with token-choice losses",
            "set loss.balance.schedule=[[0, 0]]",
        ),
        ({"loss.z": 1e-3}, "loss.z=0.001: model.moe.router.kind=expert_choice: ", "set loss.z=0"),
        (
            {"model.moe.groups": {**GROUPS, "text": {**GROUPS["text"], "num_null": 2}}},
            "model.moe.groups.text.num_null=2: model.moe.router.kind=expert_choice needs true experts only",
            "set it to 0, or model.moe.router.kind=top_k",
        ),
        (
            {"model.moe.groups": {**GROUPS, "text": {"num_experts": 2, "num_identity": 1, "top_k": 3, "ffn_dim": 16}}},
            "model.moe.groups.text.top_k=3: with model.moe.router.kind=expert_choice each of 2 experts would take more",
            "lower it to at most 2",
        ),
        (
            {"model.moe.capacity": {"factor": 1.0}},
            "model.moe.capacity: model.moe.router.kind=expert_choice: ",
            "set model.moe.capacity=null",
        ),
        (
            {"model.moe.router": {"kind": "expert_choice"}},
            "model.moe.router.causal=null: held-out evaluation would route a token by later tokens",
            "set model.moe.router.causal=threshold",
        ),
        (
            {"model.moe.router": {"kind": "expert_choice", "causal": "auxiliary"}},
            "model.moe.router.causal=auxiliary: auxiliary routers are trained in a second stage",
            "start a run with train.only=auxiliary_routers and run.init_from",
        ),
        (
            {"train.only": "auxiliary_routers", "run.init_from": "x"},
            "train.only=auxiliary_routers: model.moe.router.kind=expert_choice has no auxiliary routers",
            "with model.moe.router.causal=auxiliary",
        ),
        ({**SECOND, "run.init_from": None}, "run.init_from=null leaves it untrained", "to the run of the first stage"),
        (
            {**SECOND, "model.moe.router": {"kind": "expert_choice", "causal": "auxiliary", "noise": 1.0}},
            "model.moe.router.noise=1: the auxiliary routers",
            "set model.moe.router.noise=0",
        ),
        *(
            (
                {
                    "model.mixture_of_depths": {},
                    "model.moe.router": {"kind": "expert_choice", "causal": "threshold", **each},
                },
                f"model.moe.router.{said}: model.mixture_of_depths: which tokens reach the experts",
                "or set model.mixture_of_depths=null",
            )
            for each, said in (({"noise": 0.5}, "noise=0.5"), ({"scope": "world"}, "scope=world"))
        ),
        (
            of_capacity(capacity={"txt": 0.5}),
            "model.moe.router.capacity.txt: no such group; there are text, image",
            "did you mean 'text'?",
        ),
        (
            of_capacity(capacity={"text": 0.5}, capacity_schedule=[[0, 1.0], [5, 3.0]]),
            "model.moe.router.capacity_schedule: the factor 3 times the capacity 0.5 of group text is above 1",
            "lower the factor to at most 2, or the capacity to at most 0.333333",
        ),
        (
            {**of_capacity(capacity_schedule=[[0, 0.5], [5, 0.75]]), "model.mixture_of_depths": {}},
            "model.moe.router.capacity_schedule=[[0, 0.5], [5, 0.75]]: model.mixture_of_depths: ",
            "set model.moe.router.capacity_schedule=[[0, 0.5]], or set model.mixture_of_depths=null",
        ),
        (
            {**of_capacity(capacity_schedule=[[0, 0.5], [5, 0.75]]), "train.only": "auxiliary_routers"},
            "model.moe.router.capacity_schedule with train.only=auxiliary_routers: the steps of this run count from 0",
            "set capacity_schedule=[[0, FACTOR]] with the first stage's last factor",
        ),
        (
            {
                "model.moe.groups": {**GROUPS, "text": {"num_experts": 1, "top_k": 1, "ffn_dim": 16}},
                "model.moe.router": {"kind": "expert_choice", "causal": "threshold", "score": "softmax"},
            },
            "model.moe.router.score=softmax: the softmax over the one expert of group text is 1 for every token",
            "set model.moe.router.score=sigmoid, or raise model.moe.groups.text.num_experts",
        ),
        (
            {"model.moe.router": {"kind": "expert_choice", "causal": "threshold", "score": "softmax", "noise": 0.5}},
            "model.moe.router.score=softmax: model.moe.router.noise=0.5 is the noise of a Gumbel-sigmoid",
            "set model.moe.router.noise=0, or model.moe.router.score=sigmoid",
        ),
        (
            {"model.moe.router": {"kind": "top_k"}, "train.only": "auxiliary_routers"},
            "train.only=auxiliary_routers: model.moe.router.kind=top_k has no auxiliary routers",
            "or model.moe.router.kind=expert_choice",
        ),
    ],
    ids=lambda each: "" if isinstance(each, dict) else None,
)
def test_what_does_not_is_named_with_the_way_out(changes: dict[str, Any], text: str, way_out: str) -> None:
    problems = [relation.problem for relation in violations(config({**SOUND, **changes}))]
    assert any(text in fault and way_out in fault for fault in problems), problems


NULLS = {name: {**group, "num_null": 2} for name, group in GROUPS.items()}


def of_target(**changes: Any) -> dict[str, Any]:
    return {"model.moe.balance": [{"kind": "active_experts", "target": {"text": 1.5}, "rate": 1.0, **changes}]}


@pytest.mark.parametrize(
    ("changes", "text", "way_out"),
    [
        (
            {"model.moe.router": {"kind": "top_p"}, **of_target(target={"text": 0.5})},
            "target.text=0.5: with model.moe.router.kind=top_p a token takes at least 1 true expert",
            "raise the target, or set num_null",
        ),
        (
            {"model.moe.router": {"kind": "relu"}, **of_target(target={"text": 5.0})},
            "target.text=5: a token takes at most 4 true experts",
            "lower the target, or raise top_k",
        ),
        (
            {"model.moe.router": {"kind": "relu"}, **of_target(schedule=[[0, 4.0], [9, 1.0]])},
            "target.text=1.5 times 4 of the schedule: a token takes at most 4 true experts",
            "lower the target, or raise top_k",
        ),
        (
            {"model.moe.router": {"kind": "threshold"}, "model.moe.balance": [{"kind": "loss_free"}]},
            "model.moe.balance with kind loss_free: model.moe.router.kind=threshold takes the mean of the selection biases",
            "set per=expert in active_experts",
        ),
        (
            {"model.moe.router": {"kind": "expert_threshold"}, "parallel.dispatch": {"kind": "known_counts"}},
            "with model.moe.router.kind=expert_threshold they depend on the thresholds",
            "set model.moe.router.kind=expert_choice with model.moe.router.scope=rank",
        ),
        (
            {"model.moe.router": {"kind": "expert_threshold"}, "model.moe.groups": NULLS},
            "model.moe.groups.text.num_null=2: model.moe.router.kind=expert_threshold needs true experts only",
            "set it to 0",
        ),
    ],
    ids=lambda each: "" if isinstance(each, dict) else None,
)
def test_rules_of_adaptive_routers(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], text: str, way_out: str
) -> None:
    groups = {name: {**group, "top_k": group["num_experts"]} for name, group in GROUPS.items()}
    with pytest.raises(ConfigError) as raised:
        check(tiny_config(tiny_data, tmp_path, {**SOUND, "model.moe.groups": groups, **changes}))
    assert text in str(raised.value)
    assert way_out in str(raised.value)


@pytest.mark.parametrize("kind", ["top_p", "relu", "threshold", "predicted_k", "expert_threshold"])
def test_adaptive_routers_pass_with_what_fits(tiny_data: Path, tmp_path: Path, kind: str) -> None:
    groups = {name: {**group, "top_k": group["num_experts"]} for name, group in GROUPS.items()}
    fits = {} if kind == "expert_threshold" else of_target()
    run = check(
        tiny_config(tiny_data, tmp_path, {**SOUND, "model.moe.groups": groups, "model.moe.router": {"kind": kind}, **fits})
    )
    expected = 4.0 if kind == "expert_threshold" else 1.5  # true experts per text token: top_k, or the target
    assert run.placement.groups[0].expected_experts_per_token == expected


def test_evaluation_without_a_causal_way_is_refused_before_anything_starts(tiny_data: Path, tmp_path: Path) -> None:
    broken = tiny_config(tiny_data, tmp_path, {**SOUND, "model.moe.router": {"kind": "expert_choice"}, "loss.z": 0.1})
    with pytest.raises(ConfigError) as raised:
        check(broken)
    assert raised.value.exit_code == 78
    assert "model.moe.router.causal=null" in str(raised.value)
    assert "loss.z=0.1" in str(raised.value)
    check(tiny_config(tiny_data, tmp_path, SOUND))


def test_dispatchers_that_cannot_take_it_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    for router_set, dispatch, fault in (
        ("rank", "deep_ep_v2", "any number of experts may take a token"),
        ("world", "known_counts", "model.moe.router.scope=world they depend on the scores of other ranks"),
    ):
        router = {"kind": "expert_choice", "causal": "threshold", "scope": router_set}
        changes = {**SOUND, "model.moe.router": router, "parallel.dispatch": {"kind": dispatch}}
        with pytest.raises(ConfigError, match=fault):
            check(tiny_config(tiny_data, tmp_path, changes))
    check(tiny_config(tiny_data, tmp_path, {**SOUND, "parallel.dispatch": {"kind": "known_counts"}}))


def test_a_position_is_kept_of_something() -> None:
    with refused(ValueError, "keep_position=true"):
        config({**SOUND, "run.keep_position": True})


def test_a_router_without_a_kind_is_token_choice() -> None:
    assert config({"model.moe.router": {"normalise": "none"}}).model.moe.router == TopKRouterSection(normalise="none")
    assert isinstance(config(SOUND).model.moe.router, ExpertChoiceRouterSection)


def test_sizes_follow_the_share_that_an_expert_takes() -> None:
    for capacity, text, image in ((None, 1.0, 1.0), (0.375, 1.5, 0.75), ({"text": 0.5}, 2.0, 1.0), (1.0, 4.0, 2.0)):
        router = {"kind": "expert_choice", "causal": "threshold", "capacity": capacity}
        moe = config({**SOUND, "model.moe.router": router}).model.moe
        groups = expert_groups(moe)
        assert [group.expected_experts_per_token for group in groups] == pytest.approx([text, image])
    # Text experts are on one rank, image experts on the other. With c = 1 every token goes to all experts of its group.
    plan = expected_plan(make_placement(config(SOUND).placement, groups, num_ranks=2, token_mix={}), {}, name="full")
    assert sum(plan.load_R) == pytest.approx(0.5 * 4 * 16 + 0.5 * 2 * 24)
    assert plan.remote_rows_per_token == pytest.approx(0.5)


def test_logit_biases_need_true_experts_alone() -> None:
    groups = {**GROUPS, "text": {**GROUPS["text"], "num_null": 2}}
    router = {"model.moe.router": {"kind": "top_k", "logit_bias": True}}
    assert violations(config({**router, "model.moe.groups": GROUPS})) == []
    (found,) = violations(config({**router, "model.moe.groups": groups}))
    assert "logit_bias=true: null, identity and constant experts have no such bias" in found.problem
    assert "set their numbers in model.moe.groups.text to 0" in found.problem


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model.mixture_of_depths": {}}, "model.mixture_of_depths: model.moe.router.kind=gating_residual: a token"),
        (
            {"engine": {"kind": "megatron", "cpu_trial": True}},
            "engine.kind=megatron: model.moe.router.kind=gating_residual: logits must pass to the next layer; take another "
            "kind, or set model.moe.router.kind=top_k",
        ),
        (
            {"parallel.two_batch_overlap": True},
            "model.moe.router.kind=gating_residual: parallel.two_batch_overlap=true: a layer must not need the logits of "
            "the layer before; take another kind, or set parallel.two_batch_overlap=false",
        ),
    ],
    ids=str,
)
def test_what_passes_no_logits_has_no_gating_residual(
    tiny_data: Path, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    router = {"model.moe.router": {"kind": "gating_residual"}}
    check(tiny_config(tiny_data, tmp_path, router))
    with pytest.raises(ConfigError) as raised:
        check(tiny_config(tiny_data, tmp_path, {**router, **changes}))
    assert text in str(raised.value)
