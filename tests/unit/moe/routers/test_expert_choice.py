"""Expert choice takes the same tokens as the slow oracle, with the same weights and gradients. Cases have ties, padding,
empty groups and single tokens."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dist.moe.dispatch.known_counts import KnownCountsDispatcher
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter, Score, softmax_logits
from moe_dist.moe.routers.expert_threshold import ExpertThresholdRouter
from moe_dist.moe.routers.selection import choice_of_training as as_in_training
from moe_dist.moe.routers.selection import tokens_of_share
from moe_dist.moe.routing.draws import logistic
from moe_dist.moe.routing.types import ABSENT, GlobalBatchInfo, Routing, RoutingCache, RoutingRequest
from moe_dist.moe.thresholds import ThresholdUpdater
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup
from tests.reference.adaptive import expert_threshold
from tests.reference.expert_choice import (
    auxiliary_loss,
    choice_by_score,
    choice_of_training,
    cut_of,
    logits_of,
    moe_forward,
    room,
)
from tests.reference.layer import ReferenceWeights
from tests.support.counts import counts_with
from tests.support.messages import refused
from tests.support.one_rank_layer import context_of, one_rank_layer

D = 5
TEXT = ExpertGroup("text", 4, 0, 1, 6, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 0, 1, 7, 4, ("image",))
GROUPS = (TEXT, IMAGE)
E = 6


def make_router(
    init: int = 0,
    groups: tuple[ExpertGroup, ...] = GROUPS,
    known_counts: bool = False,
    seed: int = 0,
    layer: int = 0,
    **options: Any,
) -> ExpertChoiceRouter:
    generator = torch.Generator().manual_seed(init)
    context = RouterContext(D, groups, known_counts=known_counts, seed=seed, layer=layer)
    router = ExpertChoiceRouter(context, **{"causal": "threshold", **options}).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return router


def batch_info_of(group_T: Tensor, step: int = 2, first: int = 0) -> GlobalBatchInfo:
    return GlobalBatchInfo(step, first, 0, (len(group_T),), (tuple(int((group_T == i).sum()) for i in range(2)),))


def reference_weights(router: ExpertChoiceRouter, experts: Experts | None = None) -> dict[str, ReferenceWeights]:
    made = {}
    for group in router.groups:
        stack = experts.get_submodule(group_module(group.name)) if experts is not None else None
        parts = [getattr(stack, part) if stack is not None else torch.empty(0) for part in ("gate", "up", "down")]
        made[group.name] = ReferenceWeights(router.get_submodule(group_module(group.name)).true, None, *parts)  # pyright: ignore
    return made


def pairs_of(router: ExpertChoiceRouter, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> set[Any]:
    taken = router(h_TD, group_T, cache).assignments.taken()
    pairs = list(zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    return set(pairs)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(0, 24),
    capacity=st.sampled_from([None, 0.1, 0.5, 0.7, 1.0, {"text": 0.3, "image": 0.8}, {"image": 1.0}]),
    factor=st.sampled_from([1.0, 0.6]),
    counted=st.booleans(),
    exact=st.booleans(),
    modality=st.sampled_from([(-1, 2), (0, 1), (1, 2), (-1, 0)]),
)
def test_the_choice_equals_the_oracle(
    seed: int,
    tokens: int,
    capacity: float | dict[str, float] | None,
    factor: float,
    counted: bool,
    exact: bool,
    modality: tuple[int, int],
) -> None:
    """With `exact`, small integers make products exact and many scores equal. On a tie the earlier token is taken. Some
    scopes have only padding, only one group, or no token."""
    generator = torch.Generator().manual_seed(seed)
    schedule = ((0, 0.5), (2, factor), (3, 0.5))  # the test is in step 2
    router = make_router(seed, capacity=capacity, capacity_schedule=schedule, known_counts=counted)
    h_TD = torch.randn(tokens, D, generator=generator, dtype=torch.double)
    if exact:
        h_TD = torch.randint(-1, 2, (tokens, D), generator=generator).double()
        for parameter in router.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape, generator=generator).double()
    group_T = torch.randint(*modality, (tokens,), generator=generator)
    batch_info = batch_info_of(group_T)
    routing = router(h_TD, group_T, RoutingCache(batch_info=batch_info))
    named = capacity if isinstance(capacity, dict) else {"text": capacity, "image": capacity}
    shares = [factor * (named.get("text") or 1 / 4), factor * (named.get("image") or 1 / 2)]
    logits = logits_of(h_TD, GROUPS, reference_weights(router)).tolist() if tokens else []
    expected = choice_of_training(logits, group_T.tolist(), GROUPS, shares, [range(tokens)])
    taken = routing.assignments.taken()
    got = dict(zip(zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True), taken.weight_N, strict=True))
    assert got.keys() == expected
    assert len(got) == len(taken.token_N)
    for (token, expert), weight in got.items():
        torch.testing.assert_close(
            weight, torch.tensor(logits[token][expert], dtype=torch.double).sigmoid(), rtol=0, atol=1e-12
        )
    assert routing.counts.choices_LC[0].tolist() == [sum(e == expert for _, e in expected) for expert in range(E)]
    assert routing.counts.tokens_LG[0].tolist() == [int((group_T == index).sum()) for index in range(2)]
    without = [token for token in range(tokens) if not any(t == token for t, _ in expected)]
    assert routing.counts.unrouted_LG[0].tolist() == [sum(int(group_T[t]) == index for t in without) for index in range(2)]
    for expert in range(E):
        index = int(expert >= 4)
        scores = [1 / (1 + 2.718281828459045 ** -logits[t][expert]) for t in range(tokens) if group_T[t] == index]
        cut = cut_of(scores, shares[index]) * len(scores)
        assert routing.counts.kth_score_LE[0][expert].item() == pytest.approx(cut, abs=1e-9)
    assert routing.assignments.token_N.shape[0] == len(expected), "N is the sum of capacities"
    assert not (routing.assignments.expert_N == ABSENT).any()
    assert routing.assignments.counts_WE == ((tuple(routing.counts.choices_LC[0].tolist()),) if counted else None)
    ordered = routing.assignments.expert_N if counted else routing.assignments.token_N
    assert ordered.tolist() == sorted(ordered.tolist())


def test_capacities_are_the_reference_s_on_host_and_device() -> None:
    for tokens in range(60):
        for capacity in (1 / 3, 1 / 7, 0.1, 0.3, 1.0, 1 / 49):
            assert tokens_of_share(capacity, tokens) == room(capacity, tokens)


@pytest.mark.parametrize(("noise", "counted", "recompute"), [
    (0.0, False, "none"), (0.0, True, "block"), (1.0, False, "block"), (1.0, True, "experts"), (0.5, True, "none"),
])  # fmt: skip
def test_values_and_gradients_of_the_layer_equal_the_oracle(noise: float, counted: bool, recompute: str) -> None:
    router = make_router(3, noise=noise, known_counts=counted, seed=5, layer=7)
    dispatcher = KnownCountsDispatcher(context_of(GROUPS))
    layer = one_rank_layer(router, D, recompute=recompute, dispatcher=dispatcher).double()
    generator = torch.Generator().manual_seed(4)
    h_TD = torch.randn(23, D, generator=generator, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (23,), generator=generator)
    direction = torch.randn(23, D, generator=generator, dtype=torch.double)
    weights = reference_weights(router, layer.experts)
    drawn = noise * logistic((5, 2, 7), torch.arange(23) + 100, torch.arange(E), torch.double)
    logits = logits_of(h_TD.detach(), GROUPS, weights)
    pairs = choice_of_training((logits + drawn).tolist(), group_T.tolist(), GROUPS, [1 / 4, 1 / 2], [range(23)])
    expected = moe_forward(h_TD, pairs, group_T.tolist(), GROUPS, weights, noise_TE=drawn)
    y_TD, _ = layer(h_TD, group_T, RoutingRequest(batch_info_of(group_T, first=100)))
    torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-12)
    parameters = [h_TD, *layer.parameters()]
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    ours = torch.autograd.grad((y_TD * direction).sum(), parameters)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def softmax_of_groups(h_TD: Tensor, router: ExpertChoiceRouter) -> Tensor:
    """Returns the softmax scores [T, E]. Each softmax is over the experts of one group."""
    logits_TE = logits_of(h_TD, GROUPS, reference_weights(router))
    return torch.cat([logits_TE[:, list(group.experts)].softmax(-1) for group in GROUPS], dim=1)


@pytest.mark.parametrize("kind", ["choice", "causal", "noncausal"])
def test_softmax_scores_choose_and_weigh(kind: str) -> None:
    """The kinds are training, evaluation by thresholds (`causal`), and evaluation with training's choice (`noncausal`)."""
    router = make_router(3, score="softmax", capacity=0.3, known_counts=True)
    generator = torch.Generator().manual_seed(4)
    h_TD = torch.randn(23, D, generator=generator, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (23,), generator=generator)
    scores_TE = softmax_of_groups(h_TD, router)
    bound_E = [0.2, 0.3, 0.25, 0.4, 0.5, 0.6]
    for gate, bounds in zip(router.gates(), (bound_E[:4], bound_E[4:]), strict=True):
        gate.threshold.copy_(torch.tensor(bounds, dtype=gate.threshold.dtype))
    router.train(kind == "choice")
    if kind == "causal":
        expected = choice_by_score(scores_TE.tolist(), group_T.tolist(), GROUPS, bound_E)
        routing = router(h_TD, group_T, RoutingCache())
    else:
        expected = choice_of_training(scores_TE.tolist(), group_T.tolist(), GROUPS, [0.3, 0.3], [range(23)])
        with as_in_training([router], 0):
            routing = router(h_TD, group_T, RoutingCache(batch_info=batch_info_of(group_T)))
    taken = routing.assignments.taken()
    pairs = list(zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True))
    assert set(pairs) == expected
    wanted_N = torch.stack([scores_TE[token, expert] for token, expert in pairs])
    torch.testing.assert_close(taken.weight_N, wanted_N, rtol=0, atol=1e-12)
    direction_N = torch.randn(len(pairs), generator=generator, dtype=torch.double)
    parameters = [h_TD, *router.parameters()]
    ours, theirs = (torch.autograd.grad((each * direction_N).sum(), parameters) for each in (taken.weight_N, wanted_N))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    inside_TE = group_T[:, None] == torch.tensor([0] * 4 + [1] * 2)
    torch.testing.assert_close(router.scores(h_TD, group_T), torch.where(inside_TE, scores_TE, 0.0), rtol=0, atol=1e-12)


def test_softmax_logits_of_far_apart_logits_are_finite() -> None:
    logits_Tn = torch.tensor([[200.0, -200.0, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    found_Tn = softmax_logits(logits_Tn)
    torch.testing.assert_close(found_Tn.sigmoid(), logits_Tn.softmax(-1))
    (gradient_Tn,) = torch.autograd.grad(found_Tn.sum(), [logits_Tn])
    assert gradient_Tn.isfinite().all()
    near_one_Tn = torch.tensor([[30.0, 0.0, 0.0]])  # 1 - p is 2e-13, so p is 1 in fp32
    assert float(softmax_logits(near_one_Tn)[0, 0]) == pytest.approx(30.0 - math.log(2.0))


def test_a_draw_depends_on_its_name_alone() -> None:
    columns = torch.arange(8)
    whole = logistic((1, 2, 3), torch.arange(4000), columns, torch.double)
    torch.testing.assert_close(
        logistic((1, 2, 3), torch.arange(70, 90), columns, torch.double), whole[70:90], rtol=0, atol=0
    )
    assert torch.equal(logistic((1, 2, 3), torch.arange(9), columns, torch.float32), whole[:9].float())
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert not torch.isclose(logistic(other, torch.arange(50), columns, torch.double), whole[:50]).any()
    # The difference of two Gumbel(0, 1) variables is logistic: its mean is 0, its variance pi^2 / 3, and P(x < 1) =
    # sigmoid(1).
    assert whole.isfinite().all()
    assert abs(whole.mean()) < 0.03
    assert abs(whole.var() - torch.pi**2 / 3) < 0.1
    assert abs((whole < 1.0).double().mean() - torch.tensor(1.0).sigmoid()) < 0.01
    between = torch.corrcoef(torch.cat([whole.T, whole.roll(1, 0).T])).fill_diagonal_(0)
    assert between.abs().max() < 0.08
    assert torch.equal(logistic((1, 2, 3), torch.tensor([1 << 40]), columns, torch.double).isfinite(), torch.ones(1, 8) > 0)


def test_evaluation_is_by_threshold_or_by_auxiliary_router() -> None:
    generator = torch.Generator().manual_seed(0)
    h_TD = torch.randn(30, D, generator=generator, dtype=torch.double)
    group_T = torch.randint(-1, 2, (30,), generator=generator)
    bounds = torch.tensor([0.4, 0.5, 0.6, 0.99, 0.0, 1.0], dtype=torch.double)
    router = make_router(1).eval()
    for gate, part in zip(router.gates(), bounds.split([4, 2]), strict=True):
        gate.threshold.copy_(part)
    scores = logits_of(h_TD, GROUPS, reference_weights(router)).sigmoid()
    expected = choice_by_score(scores.tolist(), group_T.tolist(), GROUPS, bounds.tolist())
    assert pairs_of(router, h_TD, group_T) == expected
    assert {e for _, e in expected} == {0, 1, 2, 3, 4}
    trained = choice_of_training(scores.tolist(), group_T.tolist(), GROUPS, [1 / 4, 1 / 2], [range(30)])
    with as_in_training([router], 0):
        assert pairs_of(router, h_TD, group_T) == trained
    assert pairs_of(router, h_TD, group_T) == expected
    router = make_router(1, causal="auxiliary").eval()
    passes = torch.cat([gate.auxiliary(h_TD) for gate in router.gates()], dim=1)
    for token in range(3):
        gate = router.gates()[0].auxiliary
        by_hand = gate.outer @ torch.nn.functional.silu(gate.inner @ h_TD[token])
        torch.testing.assert_close(passes[token, :4], by_hand)
    expected = choice_by_score(passes.sigmoid().tolist(), group_T.tolist(), GROUPS, [0.5] * E)
    assert pairs_of(router, h_TD, group_T) == expected
    with refused(AssertionError):
        make_router(causal=None).eval()(h_TD, group_T)


@pytest.mark.parametrize("kind", [ExpertChoiceRouter, ExpertThresholdRouter])
def test_capacities_follow_the_steps_and_evaluation_those_of_the_last(kind: type[ExpertChoiceRouter]) -> None:
    schedule = ((0, 0.5), (3, 1.0), (5, 0.25))
    router = kind(RouterContext(D, GROUPS), causal="threshold", capacity={"text": 0.8}, capacity_schedule=schedule).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    h_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    group_T = torch.tensor([0, 1] * 10)
    # For each capacity factor, how many of its group's 10 tokens each of 4 text and 2 image experts takes: ceil(10 c).
    taken = {0.5: [4] * 4 + [3] * 2, 1.0: [8] * 4 + [5] * 2, 0.25: [2] * 4 + [2] * 2}
    factors = [0.5, 0.5, 0.5, 1.0, 1.0, 0.25, 0.25]
    for step, factor in enumerate(factors):
        routing = router(h_TD, group_T, RoutingCache(batch_info=batch_info_of(group_T, step)))
        assert routing.counts.choices_LC[0].tolist() == taken[factor]
    router.eval()
    for steps, factor in enumerate([0.5, *factors]):  # the model has taken `steps` steps
        with as_in_training([router], steps):
            assert router(h_TD, group_T).counts.choices_LC[0].tolist() == taken[factor]


def test_a_factor_that_makes_the_capacity_one_leaves_no_threshold() -> None:
    router = ExpertChoiceRouter(RouterContext(D, GROUPS), capacity=1 / 49, capacity_schedule=((0, 49.0),)).double()
    assert 49 * (1 / 49) < 1.0
    routed = router(torch.randn(6, D, dtype=torch.double), torch.tensor([0, 1] * 3))
    assert routed.counts.choices_LC[0].tolist() == [3] * E
    assert routed.counts.kth_score_LE[0].tolist() == [0.0] * E


def test_auxiliary_routers_learn_the_choice_and_nothing_else_does() -> None:
    router = make_router(2, causal="auxiliary")
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(17, D, generator=generator, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (17,), generator=generator)
    routing = router(h_TD, group_T)
    tokens_G = routing.counts.tokens_LG[0]
    got = (routing.aux.auxiliary_LG[0] / (tokens_G * torch.tensor([4, 2]))).sum()
    logits = logits_of(h_TD.detach(), GROUPS, reference_weights(router))
    pairs = choice_of_training(logits.tolist(), group_T.tolist(), GROUPS, [1 / 4, 1 / 2], [range(17)])
    passes = torch.cat([gate.auxiliary(h_TD.detach()) for gate in router.gates()], dim=1)
    expected = auxiliary_loss(passes, pairs, group_T.tolist(), GROUPS)
    torch.testing.assert_close(got, expected)
    parameters = [p for gate in router.gates() for p in gate.auxiliary.parameters()]
    ours = torch.autograd.grad(got, parameters, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, parameters))
    untouched = torch.autograd.grad(got, [h_TD, router.gates()[0].true], allow_unused=True)
    assert untouched == (None, None)
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    undecided_LG = router(h_TD, group_T).aux.auxiliary_LG
    torch.testing.assert_close(undecided_LG[0], (tokens_G * torch.tensor([4, 2])).double() * math.log(2))


def test_arithmetic_and_weights_are_fp32_for_bf16_tokens() -> None:
    router = make_router().float()
    h_TD, group_T = torch.randn(12, D).bfloat16(), torch.zeros(12, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(h_TD, group_T)
    assert routing.assignments.weight_N.dtype == torch.float32
    logits = h_TD.float() @ router.gates()[0].true.T  # pyright: ignore[reportCallIssue, reportArgumentType]
    taken = routing.assignments.taken()
    torch.testing.assert_close(taken.weight_N, logits.sigmoid()[taken.token_N, taken.expert_N])


def listed(routing: Routing, num_tokens: int, width: int) -> tuple[list[list[int]], list[list[float]]]:
    """Returns the experts and weights of each token's pairs, by descending weight. This is the slow reference of
    `ChosenColumns`."""
    found: list[list[tuple[float, int]]] = [[] for _ in range(num_tokens)]
    pairs = routing.assignments.taken()
    for token, expert, weight in zip(*(each.tolist() for each in pairs[:3]), strict=True):
        found[token].append((-weight, expert))
    rows = [[*sorted(row), *[(0.0, ABSENT)] * (width - len(row))] for row in found]
    return [[expert for _, expert in row] for row in rows], [[-weight for weight, _ in row] for row in rows]


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"capacity": 0.5}, True), ({"capacity": 0.5, "noise": 1.0}, True), ({"score": "softmax"}, False),
        ({"causal": "auxiliary"}, False), ({"warmup_steps": 1}, True), ({"warmup_steps": 1}, False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_recorded_token_has_its_own_experts_the_best_first(options: dict[str, Any], training: bool, tokens: int) -> None:
    """Cases include tokens without experts, padding, and a group that has fewer experts than the largest group."""
    if "warmup_steps" in options:
        router = ExpertThresholdRouter(RouterContext(D, GROUPS), **options).double()
    else:
        context = RouterContext(D, GROUPS, known_counts=options == {"capacity": 0.5})
        router = ExpertChoiceRouter(context, **{"causal": "threshold", **options}).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
    for gate in router.gates():
        gate.threshold.fill_(0.55)
        gate.statistics.copy_(torch.tensor([[0.6], [9.0]]).expand_as(gate.statistics))
    router.train(training)
    h_TD = torch.randn(tokens, D, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    group_T = torch.arange(tokens) % 3 - 1  # every third token is padding
    cache = RoutingCache(keep_choices=True, batch_info=batch_info_of(group_T) if training else None)
    routing = router(h_TD, group_T, cache)
    column_TK, weight_TK = listed(routing, tokens, width=4)
    assert (routing.chosen.column_TK.dtype, routing.chosen.column_TK.shape) == (torch.int16, (tokens, 4))
    assert routing.chosen.column_TK.tolist() == column_TK
    assert routing.chosen.weight_TK.tolist() == torch.tensor(weight_TK, dtype=torch.float16).view(tokens, 4).tolist()
    numbers = {
        sum(expert != ABSENT for expert in row)
        for row, group in zip(column_TK, group_T.tolist(), strict=True)
        if group >= 0
    }
    assert tokens < 40 or min(numbers) == 0 < max(numbers), numbers
    assert router(h_TD, group_T, replace(cache, keep_choices=False)).chosen is None


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_expert_threshold_takes_by_competition_and_then_by_its_running_mean(score: Score) -> None:
    """In the first update an expert takes the tokens with the highest scores. In later updates it takes every token
    whose score exceeds its running mean. Calibration for evaluation does not change training."""
    router = ExpertThresholdRouter(RouterContext(D, GROUPS), warmup_steps=1, score=score).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    h_TD = torch.randn(40, D, dtype=torch.double, generator=generator, requires_grad=True)
    group_T = torch.tensor([0, 0, 0, 1, 1] * 8)
    group_T[7] = -1
    members_G = [int((group_T == index).sum()) for index in range(2)]
    scores_TE = logits_of(h_TD, GROUPS, reference_weights(router)).sigmoid()
    if score == "softmax":
        scores_TE = softmax_of_groups(h_TD, router)
    inside_TE = group_T[:, None] == torch.tensor([0] * 4 + [1] * 2)
    competed = router(h_TD, group_T)
    taken_E = [room(1 / 4, members_G[0])] * 4 + [room(1 / 2, members_G[1])] * 2
    assert competed.counts.choices_LC[0].tolist() == taken_E
    kth_score_LE, tokens_LG = competed.counts.kth_score_LE, torch.tensor([members_G]).double()
    ThresholdUpdater([router.gates()], 0.5).after_step(counts_with(kth_score_LE=kth_score_LE, tokens_LG=tokens_LG))
    mean_E = torch.cat([gate.running_mean()[1] for gate in router.gates()])
    sorted_TE = torch.where(inside_TE, scores_TE, 0.0).sort(dim=0, descending=True).values
    torch.testing.assert_close(mean_E, torch.stack([sorted_TE[k - 1, expert] for expert, k in enumerate(taken_E)]))
    for gate in router.gates():
        gate.threshold += 0.3  # a calibration may change a threshold like this
        gate.statistics[0] += 1e-9  # rounding must not decide about the token with the k-th score
    mean_E = mean_E + 1e-9
    routing = router(h_TD, group_T)
    pairs = routing.assignments.taken()
    table_TE = torch.zeros(40, E, dtype=torch.double).index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    expected_TE = expert_threshold(scores_TE, mean_E.tolist()) * inside_TE
    torch.testing.assert_close(table_TE, expected_TE, rtol=0, atol=1e-12)
    assert routing.counts.choices_LC[0].tolist() == [k - 1 for k in taken_E], "above the k-th score"
    direction_TE = torch.randn(40, E, dtype=torch.double, generator=generator)
    over = [h_TD, *router.parameters()]
    fast, slow = (
        torch.autograd.grad((each * direction_TE).sum(), over, retain_graph=True) for each in (table_TE, expected_TE)
    )
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
