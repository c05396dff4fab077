"""The eight workloads: distinct experts, all from (workload, seed, step) alone, and each with the skew it is named for."""

import numpy as np
import pytest
import torch

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup
from tests.reference.workloads import hidden_states, router_weight
from tools.gpu_check.token_imbalance import WORKLOADS, WorkloadShape, workload_step

SHAPE = WorkloadShape(num_tokens=640, num_experts=16, top_k=3, num_shards=4)
SHAPES = [
    SHAPE,
    WorkloadShape(31, 7, 2, 3),
    WorkloadShape(5, 4, 2, 2),
    WorkloadShape(12, 6, 6, 1),
    WorkloadShape(0, 8, 2, 4),
]


def load(workload: str, step: int = 0, seed: int = 0) -> np.ndarray:
    """Tokens of each expert."""
    choice = workload_step(workload, seed=seed, step=step, shape=SHAPE).expert_TK
    return np.bincount(choice.ravel(), minlength=SHAPE.num_experts)


def by_shard(load_E: np.ndarray) -> np.ndarray:
    return load_E.reshape(SHAPE.num_shards, -1).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_row_has_topk_distinct_experts(workload: str, shape: WorkloadShape) -> None:
    for step in range(6):
        made = workload_step(workload, seed=3, step=step, shape=shape)
        assert made.expert_TK.shape == made.weight_TK.shape == (shape.num_tokens, shape.top_k)
        assert all(len(set(row)) == shape.top_k for row in made.expert_TK.tolist())
        assert ((made.expert_TK >= 0) & (made.expert_TK < shape.num_experts)).all()
        assert len(made.tokens_S) == shape.num_shards
        assert sum(made.tokens_S) == shape.num_tokens
        rows = np.concatenate([np.arange(shape.num_tokens)[made.rows_of(source)] for source in range(shape.num_shards)])
        assert rows.tolist() == list(range(shape.num_tokens))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_step_follows_from_workload_seed_and_step_alone(workload: str) -> None:
    first, again = (workload_step(workload, seed=1, step=4, shape=SHAPE) for _ in range(2))
    np.testing.assert_array_equal(first.expert_TK, again.expert_TK)
    np.testing.assert_array_equal(first.weight_TK, again.weight_TK)
    assert first.tokens_S == again.tokens_S
    for other in (
        workload_step(workload, seed=2, step=4, shape=SHAPE),
        workload_step(workload, seed=1, step=5, shape=SHAPE),
    ):
        assert (other.expert_TK != first.expert_TK).any()


def test_w0_is_balanced() -> None:
    assert np.ptp(load("W0")) <= 1


def test_hot_experts_are_as_many_and_as_hot_anywhere_on_one_shard_and_spread() -> None:
    for seed in range(5):
        for name in ("W1", "W2", "W3"):
            hot = np.argsort(load(name, seed=seed))[-SHAPE.num_hot :]
            share = load(name, seed=seed)[hot].sum() / load(name, seed=seed).sum()
            assert 0.5 < share < 0.67, (name, share)  # 2 of 16, drawn 3 times without replacement: at most 2/3
            shards = set((hot // 4).tolist())
            assert name != "W2" or len(shards) == 1
            assert name != "W3" or len(shards) == SHAPE.num_hot
        assert by_shard(load("W2", seed=seed)).max() > 1.4 * by_shard(load("W3", seed=seed)).max()


def test_w5_leaves_one_shard_without_a_token() -> None:
    for step in range(4):
        shards = by_shard(load("W5", step))
        assert (shards == 0).sum() == 1
        assert shards.argmin() == by_shard(load("W5", 0)).argmin()
        assert np.ptp(shards[shards > 0]) <= 4


def test_w6_moves_its_hot_shard_at_each_step() -> None:
    hottest = [int(by_shard(load("W6", step)).argmax()) for step in range(8)]
    assert sorted(hottest[:4]) == [0, 1, 2, 3]
    assert hottest[:4] == hottest[4:]


def test_w7_is_balanced_but_for_its_burst() -> None:
    spread = [int(np.ptp(load("W7", step))) for step in range(16)]
    assert [step for step in range(16) if spread[step] > 1] == [4, 5, 12, 13]


def test_hidden_states_make_the_router_choose_the_workload() -> None:
    group = ExpertGroup("all", SHAPE.num_experts, 0, SHAPE.top_k, 4, 0, ("text",))
    router = TopKRouter(RouterContext(20, [group])).double()
    with torch.no_grad():
        router.get_submodule("group:all").true.copy_(torch.from_numpy(router_weight(SHAPE.num_experts, 20)))  # pyright: ignore
    for workload in WORKLOADS:
        step = workload_step(workload, seed=0, step=5, shape=SHAPE)
        h_TD = torch.from_numpy(hidden_states(step, num_experts=SHAPE.num_experts, hidden_dim=20, seed=0))
        expert_N = router(h_TD, torch.zeros(SHAPE.num_tokens, dtype=torch.int64)).assignments.expert_N
        np.testing.assert_array_equal(np.sort(expert_N.view(-1, 3).numpy()), np.sort(step.expert_TK))
