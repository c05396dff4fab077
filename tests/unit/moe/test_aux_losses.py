"""Balance and z terms against the loops of the oracle: values, gradients, and the sum over ranks."""

import pytest
import torch

from moe_dist.moe.aux_losses import ColumnTables, balance_terms, z_terms
from moe_dist.moe.reference import balance_loss
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup

D = 5
TEXT = ExpertGroup("text", 4, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 2, 1, 8, 4, ("image",))
TABLES = ColumnTables.on((TEXT, IMAGE), torch.device("cpu"))


def make_router() -> TopKRouter:
    torch.manual_seed(1)
    router = TopKRouter(D, (TEXT, IMAGE)).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


@pytest.mark.parametrize("kind", ["null_averaged", "vanilla"])
def test_terms_of_two_ranks_add_up_to_the_oracle(kind: str) -> None:
    router = make_router()
    h_TD = torch.randn(60, D, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (60,))
    halves = [router(h_TD[half], group_T[half]).sums for half in (slice(0, 22), slice(22, 60))]
    choices_LC = sum(sums.choices_C for sums in halves)[None]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    tokens_LG = sum(sums.tokens_G for sums in halves)[None]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    ours = sum(
        balance_terms(sums.prob_C[None], choices_LC, tokens_LG, TABLES, kind=kind)[0]  # pyright: ignore[reportArgumentType]
        for sums in halves
    )
    for index, group in enumerate((TEXT, IMAGE)):
        gate = router.get_submodule(group.name)
        logits = h_TD[group_T == index] @ torch.cat([gate.true, gate.null]).T  # pyright: ignore
        expected = balance_loss(logits, group.num_experts, group.top_k, null_averaged=kind == "null_averaged")
        torch.testing.assert_close(ours[index], expected)  # pyright: ignore[reportIndexIssue]
        (g1,) = torch.autograd.grad(ours[index], h_TD, retain_graph=True)  # pyright: ignore[reportIndexIssue, reportArgumentType]
        (g2,) = torch.autograd.grad(expected, h_TD, retain_graph=True)
        torch.testing.assert_close(g1, g2)


@pytest.mark.parametrize("kind", ["null_averaged", "vanilla"])
def test_identity_columns_share_a_load_and_constant_ones_do_not(kind: str) -> None:
    group = ExpertGroup("text", 3, 2, 4, 8, 0, ("text",), num_identity=3, num_constant=2)
    torch.manual_seed(2)
    router = TopKRouter(D, (group,)).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    h_TD = torch.randn(50, D, dtype=torch.double, requires_grad=True)
    sums = router(h_TD, torch.zeros(50, dtype=torch.int64)).sums
    tables = ColumnTables.on((group,), torch.device("cpu"))
    ours = balance_terms(sums.prob_C[None], sums.choices_C[None], sums.tokens_G[None], tables, kind=kind)[0, 0]  # pyright: ignore
    gate = router.get_submodule("text")
    logits = h_TD @ torch.cat([gate.true, gate.null, gate.identity, gate.constant]).T  # pyright: ignore
    averaged = kind == "null_averaged"
    expected = balance_loss(logits, 3, 4, null_averaged=averaged, num_null=2, num_identity=3)
    torch.testing.assert_close(ours, expected)
    (g1,) = torch.autograd.grad(ours, h_TD, retain_graph=True)
    (g2,) = torch.autograd.grad(expected, h_TD)
    torch.testing.assert_close(g1, g2)


def test_null_averaging_gives_every_null_the_same_pull() -> None:
    """d loss / d P_i is equal for all nulls of a group, whatever their own loads (AdaMoE); vanilla's differ."""
    prob_LC = torch.rand(1, 11, dtype=torch.double, requires_grad=True)
    choices_LC = torch.tensor([[9, 1, 4, 6, 2, 2, 30, 0, 3, 7, 1]])
    tokens_LG = torch.tensor([[20, 12]])
    (averaged,) = torch.autograd.grad(balance_terms(prob_LC, choices_LC, tokens_LG, TABLES).sum(), prob_LC)
    assert averaged[0, 6] == averaged[0, 7] == averaged[0, 8]
    assert averaged[0, 9] == averaged[0, 10]
    vanilla_terms = balance_terms(prob_LC, choices_LC, tokens_LG, TABLES, kind="vanilla")
    (vanilla,) = torch.autograd.grad(vanilla_terms.sum(), prob_LC)
    assert vanilla[0, 6] > vanilla[0, 8] > vanilla[0, 7]


def test_a_uniform_router_costs_top_k() -> None:
    prob_LC = torch.cat(
        [torch.full((1, 4), 10 / 7), torch.full((1, 2), 3.0), torch.full((1, 3), 10 / 7), torch.full((1, 2), 3.0)], 1
    )
    choices_LC = torch.cat(
        [torch.full((1, 4), 30 / 7), torch.full((1, 2), 3.0), torch.full((1, 3), 30 / 7), torch.full((1, 2), 3.0)], 1
    )
    terms = balance_terms(prob_LC, choices_LC, torch.tensor([[10, 12]]), TABLES)
    torch.testing.assert_close(terms, torch.tensor([[3.0, 1.0]]))


def test_a_group_without_tokens_contributes_zero() -> None:
    prob_LC = torch.zeros(1, 11, requires_grad=True)
    terms = balance_terms(prob_LC, torch.zeros(1, 11), torch.zeros(1, 2), TABLES)
    assert (terms == 0).all()
    terms.sum().backward()
    assert prob_LC.grad is not None
    assert prob_LC.grad.isfinite().all()


def test_z_is_the_mean_squared_log_sum_exp() -> None:
    router = make_router()
    h_TD, group_T = torch.randn(30, D, dtype=torch.double), torch.randint(0, 2, (30,))
    sums = router(h_TD, group_T).sums
    expected = []
    for token, index in enumerate(group_T.tolist()):
        gate = router.get_submodule((TEXT, IMAGE)[index].name)
        expected.append((torch.cat([gate.true, gate.null]) @ h_TD[token]).logsumexp(0) ** 2)  # pyright: ignore
    torch.testing.assert_close(z_terms(sums.log_z_squared_G[None], sums.tokens_G[None])[0], torch.stack(expected).mean())
