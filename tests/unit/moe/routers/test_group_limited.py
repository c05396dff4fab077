"""The group-limited router has the results of transformers' router and, in small cases, the results that were computed
by hand. test_contract.py compares it with a loop."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.losses import ColumnTables, balance_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.placement.placement import ExpertGroup
from tests.reference.group_limited import limited_balance_loss
from tests.unit.moe.routers.test_contract import tensors_of

T, D = 60, 6
TEXT = ExpertGroup("text", 8, 3, 3, 8, 0, ("text",))


def made(*groups: ExpertGroup, bias: bool = True, **options: Any) -> GroupLimitedRouter:
    torch.manual_seed(0)
    router = GroupLimitedRouter(RouterContext(D, groups), **{"n_group": 4, "topk_group": 2, **options}).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    for name, buffer in router.named_buffers():
        if name.endswith("bias") and bias:
            torch.nn.init.normal_(buffer, std=0.3)
    return router


def tokens() -> Tensor:
    return torch.randn(T, D, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()


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
        theirs.weight.copy_(tensors_of(ours, group)["rows"])
        theirs.e_score_correction_bias.copy_(tensors_of(ours, group)["bias"])
    h_TD = torch.randn(200, D)
    _, weight_TK, expert_TK = theirs(h_TD)
    expected_TE = torch.zeros(200, 8).scatter(1, expert_TK, weight_TK)
    pairs = ours(h_TD, torch.zeros(200, dtype=torch.int64)).assignments.taken()
    got_TE = torch.zeros(200, 8).index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    torch.testing.assert_close(got_TE, expected_TE, rtol=1e-6, atol=1e-7)
    score_TE = torch.randn(200, 8)
    (wanted,) = torch.autograd.grad((expected_TE * score_TE).sum(), theirs.weight)
    (found,) = torch.autograd.grad((got_TE * score_TE).sum(), ours.gate(group).get_parameter("true"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_all_choices_null() -> None:
    group = ExpertGroup("all", 4, 2, 2, 8, 0, ("text",))
    router = made(group, n_group=2, topk_group=1)
    tensors_of(router, group)["bias"][4:] = 100.0
    h_TD = torch.randn(5, D, dtype=torch.double).requires_grad_()
    routing = router(h_TD, torch.tensor([0, 0, -1, 0, 0]))
    assert len(routing.assignments.taken().token_N) == 0
    assert routing.counts.choices_LC[0].tolist() == [0, 0, 0, 0, 4, 4]
    routing.assignments.weight_N.sum().backward()
    assert not h_TD.grad.any()  # pyright: ignore[reportOptionalMemberAccess]


def test_the_balance_loss_is_of_normalised_scores() -> None:
    router = made(TEXT, n_group=4, topk_group=2)
    h_TD = tokens()
    routed = router(h_TD, torch.zeros(T, dtype=torch.int64))
    tables = ColumnTables.on((TEXT,), torch.device("cpu"))
    loads = (routed.counts.choices_LC, routed.counts.tokens_LG)
    fast = balance_terms(routed.aux.prob_LC, *loads, tables, kind="vanilla").sum()
    tensors = tensors_of(router, TEXT)
    logits_TC = h_TD @ tensors["rows"].T
    slow = limited_balance_loss(logits_TC, logits_TC.sigmoid() + tensors["bias"], TEXT, n_group=4, topk_group=2)
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(each, [h_TD, *router.parameters()], retain_graph=True) for each in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
