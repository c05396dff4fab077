"""The group-limited router against a loop over tokens and against transformers' router: values and gradients."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.loss_free import LossFree
from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.moe.routing.types import Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from tests.reference.group_limited import limited_balance_loss, limited_weights
from tests.support.counts import counts_with

T, D = 60, 6
# Uneven groups: one with null experts, one with identity and constant experts, one with only true experts.
TEXT = ExpertGroup("text", 8, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 4, 1, 2, 8, 8, ("image",), num_identity=1, num_constant=1)
PLAIN = ExpertGroup("all", 8, 0, 4, 8, 0, ("text", "image"))
KINDS = ("true", "null", "identity", "constant")


def made(*groups: ExpertGroup, bias: bool = True, **options: Any) -> GroupLimitedRouter:
    torch.manual_seed(0)
    router = GroupLimitedRouter(RouterContext(D, groups), **{"n_group": 4, "topk_group": 2, **options}).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    for name, buffer in router.named_buffers():
        if name.endswith("bias") and bias:
            torch.nn.init.normal_(buffer, std=0.3)
    return router


def tokens(num_groups: int) -> tuple[Tensor, Tensor]:
    """Returns rows, and groups with padding among them."""
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(T, D, dtype=torch.double, generator=generator).requires_grad_()
    return h_TD, torch.randint(-1, num_groups, (T,), generator=generator)


def rows_of(router: GroupLimitedRouter, group: ExpertGroup) -> Tensor:
    gate = dict(router.get_submodule(router_module(router, group)).named_parameters())
    return torch.cat([gate[kind] for kind in KINDS if kind in gate])


def router_module(router: GroupLimitedRouter, group: ExpertGroup) -> str:
    """Returns the name of a group's part of the router, with any prefix."""
    return next(name for name, _ in router.named_children() if name.endswith(group.name))


def bias_of(router: GroupLimitedRouter, group: ExpertGroup) -> Tensor | None:
    return dict(router.get_submodule(router_module(router, group)).named_buffers()).get("bias")


def columns_of(groups: tuple[ExpertGroup, ...], group: ExpertGroup) -> list[int]:
    """Returns the columns of one group among all choice columns, in the group's order."""
    counts = [[getattr(each, f"num_{kind}") for each in groups] for kind in ("experts", "null", "identity", "constant")]
    index, first, columns = groups.index(group), 0, []
    for kind in counts:
        start = first + sum(kind[:index])
        columns += range(start, start + kind[index])
        first += sum(kind)
    return columns


def table(router: GroupLimitedRouter, routing: Routing, groups: tuple[ExpertGroup, ...]) -> Tensor:
    """Returns the weight of each token's choice column [T, C], 0 for null columns."""
    weight_TC = torch.zeros(T, sum(group.num_columns for group in groups), dtype=torch.double)
    pairs = routing.assignments.taken()
    weight_TC = weight_TC.index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    if routing.zero_weight_TF is not None:
        weight_TC = torch.cat([weight_TC[:, : router.first_zero_computation], routing.zero_weight_TF], dim=1)
    return weight_TC


def slow_table(
    router: GroupLimitedRouter, h_TD: Tensor, group_T: Tensor, groups: tuple[ExpertGroup, ...], **options: Any
) -> Tensor:
    rows = []
    for token, index in enumerate(group_T.tolist()):
        row_C = torch.zeros(sum(group.num_columns for group in groups), dtype=torch.double)
        if index >= 0:
            group, columns = groups[index], columns_of(groups, groups[index])
            logits_C = rows_of(router, group) @ h_TD[token]
            for column, weight in limited_weights(logits_C, bias_of(router, group), group, **options).items():
                row_C = row_C.index_put((torch.tensor(columns[column]),), weight)
        rows.append(row_C)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("groups", "limit", "normalise", "bias"),
    list(product([(TEXT, IMAGE), (PLAIN,)], [(1, 1), (2, 1), (2, 2)], ["true_chosen", "none"], [True, False])),
)
def test_equals_the_loop_in_values_and_gradients(
    groups: tuple[ExpertGroup, ...], limit: tuple[int, int], normalise: Any, bias: bool
) -> None:
    n_group, topk_group = limit
    router = made(
        *groups, n_group=n_group, topk_group=topk_group, normalise=normalise, scale=2.5, bias=bias, selection_bias=bias
    )
    h_TD, group_T = tokens(len(groups))
    fast_TC = table(router, router(h_TD, group_T), groups)
    limits = {"n_group": n_group, "topk_group": topk_group}
    slow_TC = slow_table(router, h_TD, group_T, groups, normalise=normalise == "true_chosen", scale=2.5, **limits)
    torch.testing.assert_close(fast_TC, slow_TC, rtol=0, atol=1e-12)
    over = [h_TD, *router.parameters()]
    score_TC = torch.randn(fast_TC.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    fast, slow = (
        torch.autograd.grad((each * score_TC).sum(), over, allow_unused=True, materialize_grads=True, retain_graph=True)
        for each in (fast_TC, slow_TC)
    )
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n_group", "topk_group", "normalise"), [(1, 1, True), (4, 2, True), (4, 1, False), (2, 2, False)])
def test_equals_transformers_router(n_group: int, topk_group: int, normalise: bool) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    group = ExpertGroup("all", 8, 0, 2, 8, 0, ("text",))
    settings = SimpleNamespace(
        num_experts_per_tok=2, num_local_experts=8, hidden_size=D, routed_scaling_factor=2.5, n_group=n_group,
        topk_group=topk_group, norm_topk_prob=normalise,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(settings)  # pyright: ignore[reportArgumentType]
    mode = "true_chosen" if normalise else "none"
    ours = made(group, n_group=n_group, topk_group=topk_group, normalise=mode, scale=2.5).float()
    with torch.no_grad():
        theirs.weight.copy_(rows_of(ours, group))
        theirs.e_score_correction_bias.copy_(bias_of(ours, group))
    h_TD = torch.randn(200, D)
    _, weight_TK, expert_TK = theirs(h_TD)
    expected_TE = torch.zeros(200, 8).scatter(1, expert_TK, weight_TK)
    pairs = ours(h_TD, torch.zeros(200, dtype=torch.int64)).assignments.taken()
    got_TE = torch.zeros(200, 8).index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    torch.testing.assert_close(got_TE, expected_TE, rtol=1e-6, atol=1e-7)
    score_TE = torch.randn(200, 8)
    (wanted,) = torch.autograd.grad((expected_TE * score_TE).sum(), theirs.weight)
    (found,) = torch.autograd.grad(
        (got_TE * score_TE).sum(), dict(ours.named_parameters())[f"{router_module(ours, group)}.true"]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_by_hand() -> None:
    """Scores .9 .1 | .6 .5 | null .55. The second node group wins by 1.1 to 1.0. The best two of its columns and the null
    column are .6 and null. The one true choice has all the weight."""
    group = ExpertGroup("all", 4, 1, 2, 8, 0, ("text",))
    router = made(group, n_group=2, topk_group=1, scale=3.0, bias=False)
    with torch.no_grad():
        for parameter, scores in zip(router.parameters(), ([0.9, 0.1, 0.6, 0.5], [0.55]), strict=True):
            parameter.zero_()[:, 0] = torch.tensor(scores, dtype=torch.double).logit()
    h_TD = torch.eye(D, dtype=torch.double)[:1]
    routing = router(h_TD, torch.zeros(1, dtype=torch.int64))
    assert [each.tolist() for each in routing.assignments.taken()[:2]] == [[0], [2]]
    torch.testing.assert_close(routing.assignments.taken().weight_N, torch.tensor([3.0], dtype=torch.double))
    assert routing.counts.choices_LC[0].tolist() == [0, 0, 1, 0, 1]


def test_all_choices_null_and_no_token_at_all() -> None:
    group = ExpertGroup("all", 4, 2, 2, 8, 0, ("text",))
    router = made(group, n_group=2, topk_group=1)
    bias = bias_of(router, group)
    assert bias is not None
    bias[4:] = 100.0
    h_TD = torch.randn(5, D, dtype=torch.double).requires_grad_()
    routing = router(h_TD, torch.tensor([0, 0, -1, 0, 0]))
    assert len(routing.assignments.taken().token_N) == 0
    assert routing.counts.choices_LC[0].tolist() == [0, 0, 0, 0, 4, 4]
    routing.assignments.weight_N.sum().backward()
    assert not h_TD.grad.any()  # pyright: ignore[reportOptionalMemberAccess]
    empty = router(torch.zeros(0, D, dtype=torch.double), torch.zeros(0, dtype=torch.int64))
    assert (len(empty.assignments.token_N), int(empty.counts.choices_LC.sum())) == (0, 0)


def test_no_token_leaves_its_node_groups_and_recompute_keeps_the_choice() -> None:
    router, cache = made(PLAIN, n_group=4, topk_group=2), RoutingCache()
    h_TD, _ = tokens(1)
    group_T = torch.zeros(T, dtype=torch.int64)
    pairs = router(h_TD, group_T, cache).assignments.taken()
    used = torch.zeros(T, 4, dtype=torch.bool).index_put((pairs.token_N, pairs.expert_N // 2), torch.tensor(True))
    assert (used.sum(1) <= 2).all()
    assert torch.bincount(pairs.token_N, minlength=T).eq(4).all()
    again = router(h_TD + 1.0, group_T, cache).assignments.taken()
    assert torch.equal(again.expert_N, pairs.expert_N)


def test_the_balance_loss_is_of_normalised_scores() -> None:
    router = made(TEXT, n_group=4, topk_group=2)
    h_TD, _ = tokens(1)
    routed = router(h_TD, torch.zeros(T, dtype=torch.int64))
    tables = ColumnTables.on((TEXT,), torch.device("cpu"))
    loads = (routed.counts.choices_LC, routed.counts.tokens_LG)
    fast = balance_terms(routed.aux.prob_LC, *loads, tables, kind="vanilla").sum()
    logits_TC, bias = h_TD @ rows_of(router, TEXT).T, bias_of(router, TEXT)
    assert bias is not None
    slow = limited_balance_loss(logits_TC, logits_TC.sigmoid() + bias, TEXT, n_group=4, topk_group=2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(each, [h_TD, *router.parameters()], retain_graph=True) for each in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_loss_free_evens_the_load() -> None:
    """All tokens prefer the same experts at first. Some steps of the controller spread them over the other experts."""
    router = made(PLAIN, n_group=4, topk_group=2, bias=False)
    gate: Any = router.get_submodule(router_module(router, PLAIN))
    controller = BiasController([[gate]], (PLAIN,), [LossFree(rate=0.02)])
    h_TD = torch.randn(512, D, dtype=torch.double) + 1.0
    group_T, spread = torch.zeros(512, dtype=torch.int64), []
    for _ in range(150):
        choices_C = router(h_TD, group_T).counts.choices_LC[0]
        spread.append(float(choices_C.max() / choices_C.double().mean()))
        controller.after_step(counts_with(choices_LC=choices_C[None].double(), tokens_LG=torch.tensor([[512.0]]).double()))
    assert spread[0] > 1.3
    assert spread[-1] < 1.1
