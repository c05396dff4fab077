"""The router with a given mean number of experts has the values and gradients of a loop over tokens, and fair draws."""

import math

import pytest
import torch

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.draws import logistic
from moe_dist.moe.routing.types import ABSENT, GlobalBatchInfo, Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from research.routers.scheduled_top_k import HELD_OUT, ScheduledTopKRouter
from research.tests.routers.reference import fixed_load_weights

T, D, N = 40, 8, 6
GROUP = ExpertGroup("all", num_experts=N, num_null=0, top_k=3, ffn_dim=4, first_expert=0, modalities=("text",))


def made(loads: list[float], *, place: int = 0, seed: int = 3) -> ScheduledTopKRouter:
    router = ScheduledTopKRouter(RouterContext(D, [GROUP], place=place, seed=seed), active_experts={"all": loads}).double()
    with torch.no_grad():
        router.get_parameter("group:all.true").copy_(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    return router


def table(routing: Routing, tokens: int = T) -> torch.Tensor:
    weight_TE = torch.zeros(tokens, N, dtype=torch.float64)
    pairs = routing.assignments.taken()
    return weight_TE.index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)


def inputs(tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    h_TD = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return h_TD, torch.zeros(tokens, dtype=torch.int64)


@pytest.mark.parametrize("load", [0.0, 0.4, 1.0, 1.5, 2.0, 2.75, 3.0])
def test_equals_the_loop_in_values_and_gradients(load: float) -> None:
    router, (h_TD, group_T) = made([load]), inputs()
    fast_TE = table(router(h_TD, group_T))
    name = (3, HELD_OUT, 0)
    uniform = logistic(name, torch.arange(T), torch.zeros(1, dtype=torch.int64), torch.float64).sigmoid()[:, 0].tolist()
    slow_TE = fixed_load_weights(h_TD @ router.get_parameter("group:all.true").T, load, uniform)
    torch.testing.assert_close(fast_TE, slow_TE, rtol=0, atol=1e-12)
    if load:
        over = [h_TD, router.get_parameter("group:all.true")]
        score = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        fast, slow = (torch.autograd.grad((each * score).sum(), over, retain_graph=True) for each in (fast_TE, slow_TE))
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """With 1.5 experts and logits 3, 2, 1, tokens take the best expert (weight 1) or the best two (weights e : 1)."""
    router, (_, group_T) = made([1.5]), inputs(8)
    rows_ND = torch.zeros(N, D, dtype=torch.float64)
    rows_ND[:3, 0] = torch.tensor([3.0, 2.0, 1.0])
    with torch.no_grad():
        router.get_parameter("group:all.true").copy_(rows_ND)
    h_TD = torch.zeros(8, D, dtype=torch.float64)
    h_TD[:, 0] = 1.0
    weight_TE = table(router(h_TD, group_T), 8)
    second = 1.0 / (1.0 + math.e)
    alone, both = ([1.0, 0.0, 0.0], [1.0 - second, second, 0.0])
    kinds = [next(kind for kind in (alone, both) if abs(row[0] - kind[0]) < 1e-12) for row in weight_TE.tolist()]
    torch.testing.assert_close(weight_TE[:, :3], torch.tensor(kinds, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0 < kinds.count(both) < 8
    assert not weight_TE[:, 3:].any()


def test_a_whole_load_is_top_k_bit_for_bit() -> None:
    router, (h_TD, group_T) = made([3.0]), inputs()
    plain = TopKRouter(RouterContext(D, [GROUP])).double()
    plain.load_state_dict(router.state_dict())
    ours, theirs = router(h_TD, group_T), plain(h_TD, group_T)
    assert torch.equal(ours.assignments.expert_N, theirs.assignments.expert_N)
    assert torch.equal(ours.assignments.weight_N, theirs.assignments.weight_N)
    assert torch.equal(ours.counts.choices_LC, theirs.counts.choices_LC)


def test_the_mean_is_the_load_and_the_draw_is_of_the_token() -> None:
    router, tokens = made([1.0, 1.3], place=1), 4000
    h_TD, group_T = inputs(tokens)
    taken_T = (table(router(h_TD, group_T), tokens) > 0).sum(1).double()
    assert set(taken_T.unique().tolist()) == {1.0, 2.0}
    # The bound is 4 standard deviations of a share of 0.3 in a sample of 4,000 tokens.
    assert abs(float(taken_T.mean()) - 1.3) < 4 * (0.3 * 0.7 / tokens) ** 0.5
    routed = router(h_TD, group_T)
    chosen = int(routed.counts.choices_LC.sum())
    assert chosen == int(taken_T.sum()), "what is not taken is no choice: the balance loss sees the load"


def test_draws_follow_step_and_token_and_not_the_layout() -> None:
    router, (h_TD, group_T) = made([1.5]), inputs()

    def counts(step: int, first: int, rank: int, tokens_W: tuple[int, ...], part: slice) -> list[int]:
        batch_info = GlobalBatchInfo(step, first, rank, tokens_W, ((0,),) * len(tokens_W))
        routing = router(h_TD[part], group_T[part], RoutingCache(batch_info=batch_info))
        return (routing.assignments.expert_N.view(-1, 3) != ABSENT).sum(1).tolist()

    whole = counts(7, 0, 0, (T,), slice(0, T))
    assert whole == counts(7, 0, 0, (25, 15), slice(0, 25)) + counts(7, 0, 1, (25, 15), slice(25, T))
    assert whole == counts(7, 0, 0, (25,), slice(0, 25)) + counts(7, 25, 0, (15,), slice(25, T))
    assert whole != counts(8, 0, 0, (T,), slice(0, T))


def test_padding_takes_nothing() -> None:
    router, (h_TD, group_T) = made([1.5]), inputs()
    group_T[5:9] = -1
    assert not table(router(h_TD, group_T))[5:9].any()
