"""Finds a sample's neighbours: the samples with the nearest embeddings. scikit-learn searches in a memory-mapped file.

A sample i with the embedding E(x_i) gives its neighbours j the weights of RoMA (arXiv 2511.07419, section 3):

    W_ij = s_ij / sum over the neighbours of s_ij,    s_ij = exp(-||E(x_i) - E(x_j)||^2 / (2 sigma^2))

Shape letters: S samples, M members (the first M samples; only members may be neighbours), E embedding width, K neighbours.
"""

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The neighbours of one sample: their indices, int64 [K], and weights W, float64 [K]. K may be 0."""

    number_K: np.ndarray
    weight_K: np.ndarray


def neighbour_weights(squared_K: np.ndarray, bandwidth: float) -> np.ndarray:
    """Computes the weights W of a sample's neighbours, float64 [K] with sum 1, from squared embedding distances [K]."""
    exponent_K = -np.asarray(squared_K, np.float64) / (2.0 * bandwidth**2)
    # Subtracts the largest exponent. Otherwise exp would be 0 for all distant neighbours, and each weight would be 0 / 0.
    similarity_K = np.exp(exponent_K - exponent_K.max(initial=-np.inf))
    return similarity_K / similarity_K.sum()


class NeighbourIndex:
    """Finds the nearest neighbours of a sample among the M members, without the sample itself, nearest first.

    Results are cached; each neighbour takes 16 bytes. A search reads all M x E numbers. With 20,000 members of width 384 it
    takes 2 to 3 ms on one core.

    Args:
        embeddings_SE: Embeddings of all samples, as a memory-mapped array, which is not copied.
        members: M, the number of samples that may be neighbours.
        bandwidth: sigma in the formula of the weights.
        k: Number of neighbours; None if `similarity` selects the neighbours.
        similarity: Smallest s_ij that a neighbour may have; None if `k` selects the neighbours.
        random_seed: If set, a sample's neighbours are k random members, drawn with this seed and the sample's index.
    """

    def __init__(
        self,
        embeddings_SE: np.ndarray,
        members: int,
        *,
        bandwidth: float,
        k: int | None = None,
        similarity: float | None = None,
        random_seed: int | None = None,
    ) -> None:
        from sklearn.neighbors import NearestNeighbors  # imported only here, because the import takes a second

        assert (k is None) != (similarity is None), "k or a similarity"
        assert k is None or k < members, "preflight checks k"
        self._embeddings_SE, self._members, self._bandwidth = embeddings_SE, members, bandwidth
        self._k, self._random_seed = k, random_seed
        self._radius = None if similarity is None else bandwidth * float(np.sqrt(-2.0 * np.log(similarity)))
        self._search = NearestNeighbors(algorithm="brute", metric="euclidean").fit(embeddings_SE[:members])
        self._known: dict[int, Neighbours] = {}

    def __call__(self, sample: int) -> Neighbours:
        if sample not in self._known:
            self._known[sample] = self._find(sample)
        return self._known[sample]

    def _find(self, sample: int) -> Neighbours:
        found = self._drawn(sample) if self._random_seed is not None else self._searched(sample)
        number_K = found[found != sample][: self._k]
        own_E = self._embeddings_SE[sample].astype(np.float64)
        squared_K = np.square(self._embeddings_SE[number_K].astype(np.float64) - own_E).sum(1)
        order_K = np.lexsort((number_K, squared_K))  # sorted by distance, then by index
        return Neighbours(number_K[order_K], neighbour_weights(squared_K[order_K], self._bandwidth))

    def _searched(self, sample: int) -> np.ndarray:
        # Searches for one sample at a time, because the last bits of a distance depend on all samples of a search.
        query = self._embeddings_SE[sample : sample + 1]
        if self._k is None:
            return self._search.radius_neighbors(query, self._radius, return_distance=False)[0].astype(np.int64)
        # k + 1, because the result may contain the sample itself (not always first, if several embeddings are equal).
        return self._search.kneighbors(query, self._k + 1, return_distance=False)[0].astype(np.int64)

    def _drawn(self, sample: int) -> np.ndarray:
        assert self._k is not None, "the schema demands k with random neighbours"
        rng = np.random.default_rng([self._random_seed or 0, sample])
        return rng.choice(self._members, self._k + 1, replace=False).astype(np.int64)  # may contain the sample itself
