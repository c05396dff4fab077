"""The top-k router with null experts: its bits, ties, sums, and tokens with only null choices. test_contract.py compares it
with its loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.losses import BalanceKind, ColumnTables, balance_terms, z_terms
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import ABSENT
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup
from tests.reference.layer import choose

D = 6
TEXT = ExpertGroup("text", 4, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 2, 1, 8, 4, ("image",))
PLAIN = ExpertGroup("all", 4, 0, 2, 8, 0, ("text", "image"))


def make_router(*groups: ExpertGroup, **options: object) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(D, groups), **options).double()  # pyright: ignore[reportArgumentType]
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def gate_rows(router: TopKRouter, group: ExpertGroup) -> Tensor:
    gate = router.get_submodule(group_module(group.name))
    return torch.cat([gate.true, gate.null]) if group.num_null else gate.true  # pyright: ignore[reportCallIssue, reportArgumentType]


def test_without_null_experts_it_is_plain_top_k() -> None:
    router = make_router(PLAIN)
    h_TD = torch.randn(50, D, dtype=torch.double)
    assignments = router(h_TD, torch.zeros(50, dtype=torch.int64)).assignments
    logits = h_TD @ router.get_submodule("group:all").true.T  # pyright: ignore[reportCallIssue]
    top = logits.topk(2)
    assert torch.equal(assignments.expert_N.view(50, 2), top.indices)
    assert torch.equal(assignments.weight_N.view(50, 2).argsort(descending=True)[:, 0], torch.zeros(50, dtype=torch.int64))
    torch.testing.assert_close(assignments.weight_N.view(50, 2), top.values.softmax(-1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_null_experts_fp32_has_the_bits_of_plain_top_k(top_k: int) -> None:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(256, (ExpertGroup("all", 8, 0, top_k, 8, 0, ("text",)),)))
    true: Any = router.get_submodule("group:all").true
    torch.nn.init.normal_(true)
    h_TD = torch.randn(300, 256)
    assignments = router(h_TD, torch.zeros(300, dtype=torch.int64)).assignments
    top = (h_TD @ true.T).topk(top_k)
    powers_TK = (top.values - top.values[:, :1]).exp()
    total_T = powers_TK[:, 0]
    for k in range(1, top_k):  # in this order, because the bits of a sum depend on it
        total_T = total_T + powers_TK[:, k]
    assert torch.equal(assignments.expert_N.view(300, top_k), top.indices)
    assert torch.equal(assignments.weight_N.view(300, top_k), powers_TK / total_T[:, None])


def test_ties_go_to_true_experts() -> None:
    """Null rows that copy the true rows (AdaMoE's start from a trained MoE): n = 4, m = 4, k = 3 equals the plain top-2."""
    group = ExpertGroup("text", 4, 4, 3, 8, 0, ("text",))
    router = make_router(group)
    gate = router.get_submodule("group:text")
    with torch.no_grad():
        gate.true.copy_(torch.randint(-2, 3, gate.true.shape))  # pyright: ignore[reportCallIssue, reportArgumentType]
        gate.null.copy_(gate.true)  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD = torch.randint(-2, 3, (200, D)).double()  # small integers make products exact, so that copies tie
    taken = router(h_TD, torch.zeros(200, dtype=torch.int64)).assignments.taken()
    logits = h_TD @ gate.true.T  # pyright: ignore[reportCallIssue]
    plain = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :2]
    # If more than two true experts tie at the top, the third choice is also true. Otherwise it is a null copy.
    for token in range(200):
        experts = taken.expert_N[taken.token_N == token].tolist()
        assert experts[:2] == plain[token].tolist()


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize(("n", "m", "dim"), [(5, 5, 128), (5, 5, 4096), (3, 6, 256), (3, 6, 4096), (8, 16, 96)])
def test_twins_tie_in_floating_point(num_tokens: int, n: int, m: int, dim: int) -> None:
    """The bits of a product depend on its shape. One product over n + m rows would break the ties between a true row and
    its null copy."""
    torch.manual_seed(0)
    group = ExpertGroup("text", n, m, m // n + 2, 8, 0, ("text",))
    router = TopKRouter(RouterContext(dim, (group,)))
    gate = router.get_submodule("group:text")
    with torch.no_grad():
        gate.true.normal_()  # pyright: ignore[reportCallIssue]
        gate.null.copy_(gate.true.repeat(m // n, 1))  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD = torch.randn(num_tokens, dim)
    taken = router(h_TD, torch.zeros(num_tokens, dtype=torch.int64)).assignments.taken()
    plain = (h_TD @ gate.true.T).sort(dim=-1, descending=True, stable=True).indices[:, :2]  # pyright: ignore
    assert taken.token_N.tolist() == torch.arange(num_tokens).repeat_interleave(2).tolist()
    assert taken.expert_N.view(num_tokens, 2).tolist() == plain.tolist()


def test_a_token_of_null_choices_alone_gets_nothing_and_finite_gradients() -> None:
    router = make_router(ExpertGroup("text", 2, 4, 2, 8, 0, ("text",)))
    with torch.no_grad():
        router.get_submodule("group:text").null.copy_(torch.full((4, D), 5.0))  # pyright: ignore[reportCallIssue, reportArgumentType]
        router.get_submodule("group:text").true.copy_(torch.full((2, D), -5.0))  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD = torch.ones(3, D, dtype=torch.double, requires_grad=True)
    routing = router(h_TD, torch.zeros(3, dtype=torch.int64))
    assert (routing.assignments.expert_N == ABSENT).all()
    assert (routing.assignments.weight_N == 0).all()
    (
        routing.assignments.weight_N.sum() + routing.aux.prob_LC.square().sum() + routing.aux.log_z_squared_LG.sum()
    ).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [h_TD, *router.parameters()])


def test_weights_stay_finite_for_huge_logits() -> None:
    router = make_router(TEXT)
    h_TD = (1e4 * torch.randn(20, D, dtype=torch.double)).requires_grad_()
    weight_N = router(h_TD, torch.zeros(20, dtype=torch.int64)).assignments.weight_N
    weight_N.square().sum().backward()
    assert weight_N.isfinite().all()
    assert h_TD.grad is not None
    assert h_TD.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["null_averaged", "null_split"])
def test_permuting_null_columns_changes_nothing(kind: BalanceKind) -> None:
    """Choice, weights, losses and gradients stay the same. Gradients and sums of null rows are permuted with the rows."""
    router, tables = make_router(TEXT, IMAGE), ColumnTables.on((TEXT, IMAGE), torch.device("cpu"))
    h_TD, group_T = torch.randn(60, D, dtype=torch.double, requires_grad=True), torch.randint(0, 2, (60,))
    factor_N = torch.randn(router(h_TD, group_T).assignments.weight_N.shape, dtype=torch.double)
    null: Any = router.get_submodule("group:text").null
    order, found = [2, 0, 1], []
    for permute in (False, True):
        if permute:
            with torch.no_grad():
                null.copy_(null[order].clone())
        routed = router(h_TD, group_T)
        tokens_LG = routed.counts.tokens_LG
        balance = balance_terms(routed.aux.prob_LC, routed.counts.choices_LC, tokens_LG, tables, kind=kind).sum()
        z = z_terms(routed.aux.log_z_squared_LG, tokens_LG).sum()
        loss = (factor_N * routed.assignments.weight_N).sum() + balance + z
        found_of = torch.autograd.grad(loss, [h_TD, *router.parameters()])
        gradients = dict(zip(("h", *dict(router.named_parameters())), found_of, strict=True))
        found.append((routed.assignments, routed, {"balance": balance, "z": z, **gradients}))
    (before, routed, values), (after, permuted, others) = found
    assert torch.equal(before.expert_N, after.expert_N)
    torch.testing.assert_close(before.weight_N, after.weight_N, rtol=0, atol=1e-15)
    moved = torch.arange(len(routed.counts.choices_LC[0]))
    moved[6:9] = 6 + torch.tensor(order)
    assert torch.equal(routed.counts.choices_LC[0][moved], permuted.counts.choices_LC[0])
    assert not torch.equal(routed.counts.choices_LC, permuted.counts.choices_LC), "the rows differ"
    torch.testing.assert_close(routed.aux.prob_LC[0][moved], permuted.aux.prob_LC[0], rtol=0, atol=1e-12)
    for name, value in values.items():
        expected = value[order] if name == "group:text.null" else value
        torch.testing.assert_close(
            others[name], expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sums_equal_loops() -> None:
    router = make_router(TEXT, IMAGE)
    h_TD, group_T = torch.randn(25, D, dtype=torch.double), torch.randint(-1, 2, (25,))
    routed = router(h_TD, group_T)
    columns = {"text": [0, 1, 2, 3, 6, 7, 8], "image": [4, 5, 9, 10]}
    choices, probs = torch.zeros(11, dtype=torch.int64), torch.zeros(11, dtype=torch.double)
    z, entropy = torch.zeros(2, dtype=torch.double), torch.zeros(2, dtype=torch.double)
    for token, index in enumerate(group_T.tolist()):
        if index >= 0:
            group = (TEXT, IMAGE)[index]
            logits = gate_rows(router, group) @ h_TD[token]
            for choice in choose(logits.tolist(), group.num_experts, group.top_k):
                choices[columns[group.name][choice]] += 1
            p = logits.softmax(0)
            probs[columns[group.name]] += p
            z[index] += logits.exp().sum().log() ** 2
            entropy[index] -= (p * p.log()).sum()
    assert torch.equal(routed.counts.choices_LC[0], choices)
    assert routed.counts.tokens_LG[0].tolist() == [int((group_T == 0).sum()), int((group_T == 1).sum())]
    torch.testing.assert_close(routed.aux.prob_LC[0], probs)
    torch.testing.assert_close(routed.aux.log_z_squared_LG[0], z)
    torch.testing.assert_close(routed.counts.entropy_LG[0], entropy)


def test_weights_of_all_true_experts_know_no_null_one() -> None:
    """`none` gives null columns a share of the softmax. `true_all` has the bits of a model without null columns."""
    torch.manual_seed(0)
    with_nulls, without = (ExpertGroup("text", 5, m, k, 8, 0, ("text",)) for m, k in ((5, 4), (0, 2)))
    router, plain = (
        TopKRouter(RouterContext(16, (with_nulls,)), normalise="true_all"),
        TopKRouter(RouterContext(16, (without,)), normalise="none"),
    )
    gate, old = router.get_submodule("group:text"), plain.get_submodule("group:text")
    with torch.no_grad():
        old.true.normal_()  # pyright: ignore[reportCallIssue]
        gate.true.copy_(old.true)  # pyright: ignore[reportCallIssue, reportArgumentType]
        gate.null.copy_(old.true)  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD, group_T = torch.randn(33, 16), torch.zeros(33, dtype=torch.int64)
    ours, expected = (each(h_TD, group_T).assignments.taken() for each in (router, plain))
    assert torch.equal(ours.expert_N, expected.expert_N)
    assert torch.equal(ours.weight_N, expected.weight_N)
    half = TopKRouter(RouterContext(16, (with_nulls,)), normalise="none")
    half.load_state_dict(router.state_dict())
    torch.testing.assert_close(half(h_TD, group_T).assignments.taken().weight_N, expected.weight_N / 2)


@pytest.mark.parametrize("top_k", [2, 3, 5, 8])
def test_weights_do_not_depend_on_null_choices_between(top_k: int) -> None:
    """The order of additions in a sum over K depends on K. The zeros of null choices must not change the sum."""
    torch.manual_seed(top_k)
    with_nulls, without = (ExpertGroup("text", 8, m, k, 8, 0, ("text",)) for m, k in ((16, 3 * top_k), (0, top_k)))
    router, plain = TopKRouter(RouterContext(96, (with_nulls,))), TopKRouter(RouterContext(96, (without,)))
    gate, old = router.get_submodule("group:text"), plain.get_submodule("group:text")
    with torch.no_grad():
        old.true.normal_()  # pyright: ignore[reportCallIssue]
        gate.true.copy_(old.true)  # pyright: ignore[reportCallIssue, reportArgumentType]
        gate.null.copy_(old.true.repeat(2, 1))  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD, group_T = torch.randn(257, 96), torch.zeros(257, dtype=torch.int64)
    ours, expected = (each(h_TD, group_T).assignments.taken() for each in (router, plain))
    assert torch.equal(ours.expert_N, expected.expert_N)
    assert torch.equal(ours.weight_N, expected.weight_N)


def test_a_single_null_logit_stands_in_every_null_column() -> None:
    router, each = make_router(TEXT, IMAGE, null_logit="single"), make_router(TEXT, IMAGE)
    with torch.no_grad():
        for group in (TEXT, IMAGE):
            gate, wide = router.get_submodule(group_module(group.name)), each.get_submodule(group_module(group.name))
            assert gate.null.shape == (1, D)
            wide.true.copy_(gate.true)  # pyright: ignore[reportCallIssue, reportArgumentType]
            wide.null.copy_(gate.null.expand(group.num_null, D))  # pyright: ignore[reportCallIssue, reportArgumentType]
    h_TD, group_T = torch.randn(40, D, dtype=torch.double), torch.randint(0, 2, (40,))
    ours, theirs = router(h_TD, group_T), each(h_TD, group_T)
    assert torch.equal(ours.assignments.expert_N, theirs.assignments.expert_N)
    torch.testing.assert_close(ours.assignments.weight_N, theirs.assignments.weight_N, rtol=0, atol=1e-15)
    for got, expected in zip((*ours.counts, *ours.aux), (*theirs.counts, *theirs.aux), strict=True):
        torch.testing.assert_close(got, expected)
    # A token takes each of the m null places in a row or none: the logit is a threshold.
    ours.aux.prob_LC.square().sum().backward()
    theirs.aux.prob_LC.square().sum().backward()
    for group in (TEXT, IMAGE):
        shared, spread = (r.get_submodule(group_module(group.name)).null.grad for r in (router, each))
        torch.testing.assert_close(shared[0], spread.sum(0))  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]


def test_biases_of_zero_choose_by_logits_alone() -> None:
    """Where a softmax rounds two logits to the same probability, their order must stay."""
    group = ExpertGroup("text", 3, 1, 2, 8, 0, ("text",))
    router = TopKRouter(RouterContext(1, (group, IMAGE)), selection_bias=True)
    gate = router.get_submodule("group:text")
    with torch.no_grad():
        gate.true.copy_(torch.tensor([[-200.0], [-190.0], [0.0]]))  # pyright: ignore[reportCallIssue, reportArgumentType]
        gate.null.fill_(-300.0)  # pyright: ignore[reportCallIssue]
        router.get_submodule("group:image").true.zero_()  # pyright: ignore[reportCallIssue]
        router.get_submodule("group:image").null.zero_()  # pyright: ignore[reportCallIssue]
    h_TD, group_T = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    assert (router(h_TD, group_T).aux.prob_LC[0][:2] == 0.0).all()
    assert router(h_TD, group_T).assignments.expert_N.tolist() == [2, 1]
    gate.bias[0] = 0.5  # pyright: ignore[reportIndexIssue]
    assert router(h_TD, group_T).assignments.expert_N.tolist() == [2, 0]
