"""Neighbours (nearest, within a radius, random) equal the results of a search over all pairs. No sample is its own
neighbour. The manifold term and its weights equal loops over single numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.train.router_tuning.neighbours import NeighbourIndex, neighbour_weights
from moe_dist.train.router_tuning.tuning import manifold_sum
from tests.support.manifold import manifold_sum_reference, neighbour_weights_reference

SAMPLES, MEMBERS = 60, 40


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(SAMPLES, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    path: Path = tmp_path_factory.mktemp("index") / "embeddings.npy"
    np.save(path, vectors)
    return np.load(path, mmap_mode="r")


def squared(embeddings: np.ndarray, sample: int) -> np.ndarray:
    return np.square(embeddings.astype(np.float64) - embeddings[sample].astype(np.float64)).sum(1)


@pytest.mark.parametrize("k", [1, 3, MEMBERS - 1])
def test_the_k_nearest_members_but_itself(embeddings: np.ndarray, k: int) -> None:
    index = NeighbourIndex(embeddings, MEMBERS, bandwidth=0.7, k=k)
    for sample in range(SAMPLES):
        others = [number for number in range(MEMBERS) if number != sample]
        wanted = sorted(others, key=lambda number: squared(embeddings, sample)[number])[:k]
        found = index(sample)
        assert found.number_K.tolist() == wanted
        expected = neighbour_weights_reference(embeddings[sample], embeddings[wanted], 0.7)
        np.testing.assert_allclose(found.weight_K, expected, rtol=1e-6)


def test_all_members_that_are_similar_enough(embeddings: np.ndarray) -> None:
    index = NeighbourIndex(embeddings, MEMBERS, bandwidth=0.7, similarity=0.5)
    counts = set()
    for sample in range(SAMPLES):
        similarity = np.exp(-squared(embeddings, sample)[:MEMBERS] / (2 * 0.7**2))
        wanted = {number for number in range(MEMBERS) if similarity[number] >= 0.5 and number != sample}
        assert set(index(sample).number_K.tolist()) == wanted
        counts.add(len(wanted))
    assert len(counts) > 3, "the case is of no use if all have as many"


def test_random_neighbours_are_members_and_the_same_each_time(embeddings: np.ndarray) -> None:
    drawn = [
        [
            NeighbourIndex(embeddings, MEMBERS, bandwidth=1.0, k=3, random_seed=seed)(n).number_K.tolist()
            for n in range(SAMPLES)
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    for sample, numbers in enumerate(drawn[0]):
        assert len(set(numbers)) == 3
        assert sample not in numbers
        assert max(numbers) < MEMBERS
    assert len({number for numbers in drawn[0] for number in numbers}) > MEMBERS // 2


def test_many_with_the_same_embedding_are_neighbours_of_each_other() -> None:
    index = NeighbourIndex(np.ones((9, 2), np.float32), 9, bandwidth=1.0, k=3)
    for sample in range(9):
        found = index(sample)
        assert len(found.number_K) == 3
        assert sample not in found.number_K
        np.testing.assert_allclose(found.weight_K, 1 / 3)


@pytest.mark.parametrize(("samples", "neighbours"), [(4, 3), (1, 1), (3, 0)])
def test_the_term_is_the_sum_of_the_formula(samples: int, neighbours: int) -> None:
    torch.manual_seed(0)
    target_BKR = torch.rand(samples, neighbours, 5, dtype=torch.double, requires_grad=True)
    weight_BK = torch.rand(samples, neighbours, dtype=torch.double)
    weight_BK[0, 1:] = 0.0  # this sample has fewer neighbours
    values, gradients = [], []
    for term in (manifold_sum, manifold_sum_reference):
        r_BR = torch.rand(samples, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = term(r_BR, target_BKR, weight_BK)
        if neighbours:
            value.backward()
        values.append(value.item())
        gradients.append(r_BR.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    if neighbours:
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0.0)
    assert target_BKR.grad is None, "r_j is a constant"


def test_far_neighbours_of_a_small_bandwidth_still_weigh_one() -> None:
    found = neighbour_weights(np.array([2.0, 2.0, 3.0]), 0.01)  # exp(-10000) underflows to 0
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0], atol=1e-12)
    assert neighbour_weights(np.zeros(0), 1.0).shape == (0,)
