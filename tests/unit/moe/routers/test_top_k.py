"""Tests ties, rounding and extreme logits of the top-k router, and tokens with only null choices. test_contract.py compares
it with a loop."""

import pytest
import torch

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import ABSENT
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup

D = 6
TEXT = ExpertGroup("text", 4, 3, 3, 8, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 2, 1, 8, 4, ("image",))


def make_router(*groups: ExpertGroup, **options: object) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(D, groups), **options).double()  # pyright: ignore[reportArgumentType]
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def test_ties_go_to_true_experts() -> None:
    """Null rows are copies of the true rows, as when AdaMoE starts from a trained MoE. With n = 4, m = 4 and k = 3 each
    token takes the two true experts with the largest logits."""
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
    # If more than two true experts tie at the top, the third choice is also a true expert. Otherwise the third choice
    # is a null copy.
    for token in range(200):
        experts = taken.expert_N[taken.token_N == token].tolist()
        assert experts[:2] == plain[token].tolist()


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize(("n", "m", "dim"), [(5, 5, 128), (5, 5, 4096), (3, 6, 256), (3, 6, 4096), (8, 16, 96)])
def test_twins_tie_in_floating_point(num_tokens: int, n: int, m: int, dim: int) -> None:
    """How a matrix product rounds depends on its shape, so one product over all n + m rows would break the ties between a
    true row and its null copies."""
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
    assert h_TD.grad.isfinite().all()


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
    torch.testing.assert_close((*ours.counts, *ours.aux), (*theirs.counts, *theirs.aux))
    # The gradient of the single null row is the sum of the gradients of its m copies.
    ours.aux.prob_LC.square().sum().backward()
    theirs.aux.prob_LC.square().sum().backward()
    for group in (TEXT, IMAGE):
        shared, spread = (r.get_submodule(group_module(group.name)).null.grad for r in (router, each))
        torch.testing.assert_close(shared[0], spread.sum(0))  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]


def test_biases_of_zero_choose_by_logits_alone() -> None:
    """If a softmax rounds two logits to the same probability, the larger logit must still win."""
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
