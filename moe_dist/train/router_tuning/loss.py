"""The manifold term of router tuning (RoMA, arXiv 2511.07419, section 3), and the weights of its neighbours.

    term = lambda * mean over samples i of  sum_j W_ij ||r_i - r_j||^2
    W_ij = s_ij / sum over the neighbours of s_ij,    s_ij = exp(-||E(x_i) - E(x_j)||^2 / (2 sigma^2))

r is the concatenated softmax of the chosen layers at one token of a sample; r_j is a constant without gradient. A sample
without neighbours adds 0 and counts in the mean. Shape letters: B samples, K neighbours, R = layers x columns.
"""

import numpy as np
import torch
from torch import Tensor


def neighbour_weights(squared_K: np.ndarray, bandwidth: float) -> np.ndarray:
    """W of one sample's neighbours from their squared distances [K] in embedding space: float64 [K], summing to 1."""
    exponent_K = -np.asarray(squared_K, np.float64) / (2.0 * bandwidth**2)
    # Subtract the largest exponent: with a small bandwidth far neighbours would otherwise give 0 / 0.
    similarity_K = np.exp(exponent_K - exponent_K.max(initial=-np.inf))
    return similarity_K / similarity_K.sum()


def manifold_sum(r_BR: Tensor, target_BKR: Tensor, weight_BK: Tensor) -> Tensor:
    """Sum over samples and neighbours of W_ij ||r_i - r_j||^2, in the dtype of `r_BR`; absent neighbours have weight 0."""
    squared_BK = (r_BR[:, None] - target_BKR.detach()).square().sum(-1)
    return (weight_BK.to(r_BR.dtype) * squared_BK).sum()


def manifold_sum_reference(r_BR: Tensor, target_BKR: Tensor, weight_BK: Tensor) -> Tensor:
    """The same, computed number by number."""
    total = torch.zeros((), dtype=r_BR.dtype)
    for i in range(r_BR.shape[0]):
        for j in range(target_BKR.shape[1]):
            for c in range(r_BR.shape[1]):
                difference = r_BR[i, c] - float(target_BKR[i, j, c].detach())
                total = total + float(weight_BK[i, j]) * difference * difference
    return total


def neighbour_weights_reference(sample_E: np.ndarray, neighbours_KE: np.ndarray, bandwidth: float) -> np.ndarray:
    """`neighbour_weights` from the embeddings, directly by its formula."""
    similarities = []
    for other_E in neighbours_KE:
        squared = sum((float(a) - float(b)) ** 2 for a, b in zip(sample_E, other_E, strict=True))
        similarities.append(float(np.exp(-squared / (2.0 * bandwidth**2))))
    return np.array([each / sum(similarities) for each in similarities])
