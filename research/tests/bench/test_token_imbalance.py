"""In the eight workloads each row has distinct experts, and a step depends only on (workload, seed, step)."""

import numpy as np
import pytest

from research.gpu_bench.token_imbalance import WORKLOADS, WorkloadShape, workload_step

SHAPE = WorkloadShape(num_tokens=640, num_experts=16, top_k=3, num_shards=4)
SHAPES = [
    SHAPE,
    WorkloadShape(31, 7, 2, 3),
    WorkloadShape(5, 4, 2, 2),
    WorkloadShape(12, 6, 6, 1),
    WorkloadShape(0, 8, 2, 4),
]


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
