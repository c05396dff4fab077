"""Slow references of router tuning's manifold term and of its weights, computed number by number from the formulas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.train.router_tuning.samples import Samples


def manifold_sum_reference(r_BR: Tensor, target_BKR: Tensor, weight_BK: Tensor) -> Tensor:
    """The reference of `manifold_sum`."""
    total = torch.zeros((), dtype=r_BR.dtype)
    for i in range(r_BR.shape[0]):
        for j in range(target_BKR.shape[1]):
            for c in range(r_BR.shape[1]):
                difference = r_BR[i, c] - float(target_BKR[i, j, c].detach())
                total = total + float(weight_BK[i, j]) * difference * difference
    return total


def neighbour_weights_reference(sample_E: np.ndarray, neighbours_KE: np.ndarray, bandwidth: float) -> np.ndarray:
    """The reference of `neighbour_weights`, from the embeddings."""
    similarities = []
    for other_E in neighbours_KE:
        squared = sum((float(a) - float(b)) ** 2 for a, b in zip(sample_E, other_E, strict=True))
        similarities.append(float(np.exp(-squared / (2.0 * bandwidth**2))))
    return np.array([each / sum(similarities) for each in similarities])


def manifold_term_reference(
    samples: Samples, number: int, r_R: Tensor, bandwidth: float, places: Sequence[int], *, k: int = 3
) -> Any:
    """Returns the sum over the k successful neighbours j of sample i of W_ij ||r_i - r_j||^2. r_j is the stored routing of
    the layers `places`."""
    distance = np.linalg.norm(samples.embeddings_SE - samples.embeddings_SE[number], axis=1)
    members = [j for j in range(samples.manifest.right) if j != number]
    nearest = sorted(members, key=lambda j: distance[j])[:k]
    weights = neighbour_weights_reference(samples.embeddings_SE[number], samples.embeddings_SE[nearest], bandwidth)
    r_KR = torch.from_numpy(np.array(samples.routing_SLC[nearest][:, places], np.float64).reshape(k, -1))
    return sum(weight * (r_R - r_j).square().sum() for weight, r_j in zip(weights, r_KR, strict=True))
