"""Balance and z terms have the same values and gradients as the oracle's loops, also if they are summed over ranks."""

import math
from typing import Any

import pytest
import torch

from moe_dist.moe.losses import BalanceKind, ColumnTables, balance_terms, z_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup
from tests.reference.layer import balance_loss, picks_of, split_loss

D = 5
TEXT = ExpertGroup("text", 4, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 2, 1, 8, 4, ("image",))
TABLES = ColumnTables.on((TEXT, IMAGE), torch.device("cpu"))


def make_router() -> TopKRouter:
    torch.manual_seed(1)
    router = TopKRouter(RouterContext(D, (TEXT, IMAGE))).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("null_averaged", None), ("vanilla", None), *(("null_split", each) for each in (None, (1.0, 1.0), (2.5, 0.4)))],
)
def test_terms_of_two_ranks_add_up_to_the_oracle(kind: BalanceKind, weights: tuple[float, float] | None) -> None:
    router = make_router()
    h_TD = torch.randn(60, D, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (60,))
    halves = [router(h_TD[half], group_T[half]) for half in (slice(0, 22), slice(22, 60))]
    choices_LC = torch.stack([routed.counts.choices_LC[0] for routed in halves]).sum(0)[None]
    tokens_LG = torch.stack([routed.counts.tokens_LG[0] for routed in halves]).sum(0)[None]
    options: dict[str, Any] = {"kind": kind, "null_weight_G": weights}
    terms = [balance_terms(routed.aux.prob_LC, choices_LC, tokens_LG, TABLES, **options)[0] for routed in halves]
    ours_G = torch.stack(terms).sum(0)
    for index, group in enumerate((TEXT, IMAGE)):
        gate = router.get_submodule(group_module(group.name))
        logits, sizes = h_TD[group_T == index] @ torch.cat([gate.true, gate.null]).T, (group.num_experts, group.top_k)  # pyright: ignore
        if kind == "null_split":
            expected = split_loss(logits, *sizes, null_weight=1.0 if weights is None else weights[index])
        else:
            expected = balance_loss(logits, *sizes, null_averaged=kind == "null_averaged")
        torch.testing.assert_close(ours_G[index], expected)
        (g1,) = torch.autograd.grad(ours_G[index], h_TD, retain_graph=True)
        (g2,) = torch.autograd.grad(expected, h_TD, retain_graph=True)
        torch.testing.assert_close(g1, g2)


@pytest.mark.parametrize("kind", ["null_averaged", "vanilla"])
def test_identity_columns_share_a_load_and_constant_ones_do_not(kind: str) -> None:
    group = ExpertGroup("text", 3, 2, 4, 8, 0, ("text",), num_identity=3, num_constant=2)
    torch.manual_seed(2)
    router = TopKRouter(RouterContext(D, (group,))).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    h_TD = torch.randn(50, D, dtype=torch.double, requires_grad=True)
    routed = router(h_TD, torch.zeros(50, dtype=torch.int64))
    tables = ColumnTables.on((group,), torch.device("cpu"))
    ours = balance_terms(routed.aux.prob_LC, routed.counts.choices_LC, routed.counts.tokens_LG, tables, kind=kind)[0, 0]  # pyright: ignore
    gate = router.get_submodule("group:text")
    logits = h_TD @ torch.cat([gate.true, gate.null, gate.identity, gate.constant]).T  # pyright: ignore
    averaged = kind == "null_averaged"
    expected = balance_loss(logits, 3, 4, null_averaged=averaged, num_null=2, num_identity=3)
    torch.testing.assert_close(ours, expected)
    (g1,) = torch.autograd.grad(ours, h_TD, retain_graph=True)
    (g2,) = torch.autograd.grad(expected, h_TD)
    torch.testing.assert_close(g1, g2)


def test_a_group_without_tokens_contributes_zero() -> None:
    prob_LC = torch.zeros(1, 11, requires_grad=True)
    terms = balance_terms(prob_LC, torch.zeros(1, 11), torch.zeros(1, 2), TABLES)
    assert (terms == 0).all()
    terms.sum().backward()
    assert prob_LC.grad.isfinite().all()


def test_z_is_the_mean_squared_log_sum_exp() -> None:
    router = make_router()
    h_TD, group_T = torch.randn(30, D, dtype=torch.double, requires_grad=True), torch.randint(0, 2, (30,))
    routed = router(h_TD, group_T)
    expected = []
    for token, index in enumerate(group_T.tolist()):
        gate = router.get_submodule(group_module((TEXT, IMAGE)[index].name))
        expected.append((torch.cat([gate.true, gate.null]) @ h_TD[token]).logsumexp(0) ** 2)  # pyright: ignore
    ours, theirs = z_terms(routed.aux.log_z_squared_LG, routed.counts.tokens_LG)[0], torch.stack(expected).mean()
    torch.testing.assert_close(ours, theirs)
    over = [h_TD, *router.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(each, over, retain_graph=True) for each in (ours, theirs)))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    routed = router(h_TD[:4], torch.tensor([0, 0, 0, 1]))  # all logits are 0; text has 7 columns, image has 4
    by_hand = torch.tensor([(3 * math.log(7) ** 2 + math.log(4) ** 2) / 4], dtype=torch.double)
    torch.testing.assert_close(z_terms(routed.aux.log_z_squared_LG, routed.counts.tokens_LG), by_hand)


@pytest.mark.parametrize("kind", ["null_averaged", "null_split", "weighted"])
def test_a_null_weight_makes_another_load_even(kind: str) -> None:
    """With n = 4, m = 2, k = 3 and null weight w = 3, a balanced load has k n / (n + m w) = 1.2 true experts per token.
    At this load all columns have the same gradient."""
    group = ExpertGroup("text", 4, 2, 3, 8, 0, ("text",))
    tables = ColumnTables.on((group,), torch.device("cpu"))
    share = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0, 3.0]], dtype=torch.double) / 10
    prob_LC = (share * 100).requires_grad_()
    terms = balance_terms(prob_LC, share * 300, torch.tensor([[100]]), tables, kind=kind, null_weight_G=(3.0,))  # pyright: ignore
    torch.testing.assert_close(terms, torch.full((1, 1), 1.0 if kind == "null_split" else 3.0, dtype=torch.double))
    (pull,) = torch.autograd.grad(terms.sum(), prob_LC)
    torch.testing.assert_close(pull, pull[:, :1].expand_as(pull))
    logits = (torch.randn(30, 7, dtype=torch.double) @ torch.randn(7, 7, dtype=torch.double)).requires_grad_()
    sums_prob, picks = logits.softmax(-1).sum(0)[None], torch.tensor([picks_of(logits, 4, 3)])
    if kind == "null_averaged":
        both = ColumnTables.on((TEXT,), torch.device("cpu"))
        ours = balance_terms(sums_prob, picks, torch.tensor([[30]]), both, kind=kind, null_weight_G=(2.5,))  # pyright: ignore
        theirs = balance_loss(logits, 4, 3, num_null=3, null_weight=2.5)
        torch.testing.assert_close(ours[0, 0], theirs)
        g1, g2 = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (ours[0, 0], theirs))
        torch.testing.assert_close(g1, g2)


def test_the_weighted_loss_equals_the_sum_of_mixture_plus_plus() -> None:
    """Loops compute (n + others / tau) sum_i eta_i f_i P_i for each group. "others" is the number of its columns that
    are not true. eta_i is 1 for true columns, and tau for all others."""
    groups = (
        ExpertGroup("text", 3, 2, 2, 8, 0, ("text",), num_identity=1, num_constant=1),
        ExpertGroup("image", 2, 0, 2, 8, 3, ("image",), num_constant=2),
    )
    tables, taus = ColumnTables.on(groups, torch.device("cpu")), (0.25, 0.5)
    generator = torch.Generator().manual_seed(0)
    prob_LC = torch.rand(2, 11, dtype=torch.double, generator=generator, requires_grad=True)
    choices_LC, tokens_LG = torch.randint(0, 9, (2, 11), generator=generator), torch.tensor([[7, 5], [9, 0]])
    weights = tuple(1.0 / tau for tau in taus)
    ours = balance_terms(prob_LC, choices_LC, tokens_LG, tables, kind="weighted", null_weight_G=weights)
    # Columns 0-2 are the true experts of text, and 3-4 the true experts of image. 5-6 are null, 7 is identity and 8 is
    # constant in text. 9-10 are constant in image.
    columns = {0: ([0, 1, 2], [5, 6, 7, 8]), 1: ([3, 4], [9, 10])}
    expected = torch.zeros(2, 2, dtype=torch.double)
    for layer in range(2):
        for index, (true, others) in columns.items():
            tokens = max(1, int(tokens_LG[layer, index]))
            for column in true + others:
                eta = taus[index] if column in others else 1.0
                term = eta * choices_LC[layer, column] / tokens * prob_LC[layer, column] / tokens
                expected[layer, index] = expected[layer, index] + term * (len(true) + len(others) / taus[index])
    torch.testing.assert_close(ours, expected)
    g1, g2 = (torch.autograd.grad(each.sum(), prob_LC, retain_graph=True)[0] for each in (ours, expected))
    torch.testing.assert_close(g1, g2)
