"""Slow references of router tuning's manifold term and of its weights, computed number by number from the formulas."""

import numpy as np
import torch
from torch import Tensor


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
