"""Defines eight token-imbalance workloads, W0 to W7. Only (workload, seed, step) determine each token's experts.

The choices of all tokens of a step are drawn at once, and each rank takes a slice of them. A workload is therefore the
same for any dispatcher, layout and number of ranks. Every token has exactly K distinct experts. The names and purposes
of the workloads follow Megatron-LM pull request 7488. This module imports no torch, so that a tool without torch can
draw a workload.

Shape letters: T tokens of the step over all ranks, E experts, K choices per token, W shards. In a contiguous layout, the
experts of a shard are on one rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

HEAT = 16.0  # a hot expert is this many times as likely to be drawn as another expert
BURST_PERIOD, BURST_STEPS = 8, (4, 5)  # W7 has hot experts in two of eight steps

WORKLOADS: Mapping[str, str] = {
    "W0": "balanced: every expert takes the same number of tokens (within one); the control",
    "W1": "hot expert set: a few experts anywhere take most tokens; the heat of single experts",
    "W2": "hot rank: as many hot experts, as hot, all on one shard; the placement",
    "W3": "spread hot experts: as many, as hot, evenly over the shards; heat without placement",
    "W4": "source ragged: balanced experts, ranks with different numbers of tokens; skew before dispatch",
    "W5": "zero-expert rank: one shard's experts take no token; experts and ranks with no load",
    "W6": "rotating hot spot: W2 on another shard at each step; a plan that goes stale",
    "W7": "burst: W0 but for two hot steps in eight; a re-plan that steady-state numbers hide",
}


@dataclass(frozen=True)
class WorkloadShape:
    """Sizes of a workload.

    Attributes:
        num_tokens: T, summed over all source ranks.
        num_shards: W; shard w holds experts [w E / W, (w + 1) E / W).
    """

    num_tokens: int
    num_experts: int
    top_k: int
    num_shards: int

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.num_experts - len(self.shard(0)) * (self.num_shards > 1):
            raise ValueError(
                f"top_k={self.top_k}: W5 leaves one of {self.num_shards} shards of {self.num_experts} experts without "
                "tokens and gives each token top_k of the others; lower top_k, or raise num_experts or num_shards"
            )

    def shard(self, index: int) -> range:
        """Returns the experts of a shard in the contiguous layout."""
        return range(index * self.num_experts // self.num_shards, (index + 1) * self.num_experts // self.num_shards)

    @property
    def num_hot(self) -> int:
        """The number of hot experts in W1, W2, W3, W6 and W7: half of the experts of a shard, but at least one."""
        return max(1, self.num_experts // (2 * self.num_shards))


@dataclass(frozen=True)
class WorkloadStep:
    """One step of a workload.

    Attributes:
        expert_TK: int64, the K distinct experts of each token.
        weight_TK: float64, multiples of 1/16 up to 1, so that floating-point sums of few products are exact.
        tokens_S: Number of tokens of each source rank. The source ranks take consecutive slices of the [T, K] arrays.
    """

    expert_TK: np.ndarray
    weight_TK: np.ndarray
    tokens_S: tuple[int, ...]

    def rows_of(self, source: int) -> slice:
        """Returns the slice of tokens (dimension T) of one source rank."""
        start = sum(self.tokens_S[:source])
        return slice(start, start + self.tokens_S[source])


def workload_step(workload: str, *, seed: int, step: int, shape: WorkloadShape) -> WorkloadStep:
    """Draws the choices of one step. Raises KeyError if `workload` is not in `WORKLOADS`."""
    if workload not in WORKLOADS:
        raise KeyError(f"no workload {workload!r}; there are {', '.join(WORKLOADS)}")
    index = list(WORKLOADS).index(workload)
    fixed = np.random.default_rng([seed, index])  # draws equal numbers in all steps, such as the hot experts
    rng = np.random.default_rng([seed, index, 1 + step])
    hot = _hot_experts(workload, step, shape, fixed)
    dead = shape.shard(int(fixed.integers(shape.num_shards))) if workload == "W5" and shape.num_shards > 1 else range(0)
    if hot.size == 0:
        alive = np.setdiff1d(np.arange(shape.num_experts), np.asarray(dead))
        expert_TK = _balanced(shape, alive, rng)
    else:
        expert_TK = _weighted(shape, hot, rng)
    return WorkloadStep(
        expert_TK=expert_TK,
        weight_TK=rng.integers(1, 17, expert_TK.shape) / 16.0,
        tokens_S=_ragged(shape, fixed) if workload == "W4" else _even(shape),
    )


def _hot_experts(workload: str, step: int, shape: WorkloadShape, fixed: np.random.Generator) -> np.ndarray:
    """Returns the hot experts of a step; an empty array if the step's load is balanced."""
    if workload == "W1":
        return fixed.permutation(shape.num_experts)[: shape.num_hot]
    if workload == "W3":
        offset = int(fixed.integers(shape.num_experts))
        return (offset + np.arange(shape.num_hot) * shape.num_experts // shape.num_hot) % shape.num_experts
    if workload in ("W2", "W6") or (workload == "W7" and step % BURST_PERIOD in BURST_STEPS):
        first = int(fixed.integers(shape.num_shards))
        shard = shape.shard((first + step) % shape.num_shards if workload == "W6" else first)
        return np.asarray(shard)[: shape.num_hot]
    return np.zeros(0, np.int64)


def _balanced(shape: WorkloadShape, alive: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gives each token K consecutive experts of a shuffled ring, so that token counts of experts differ by at most one."""
    ring = rng.permutation(alive)
    place_TK = np.arange(shape.num_tokens * shape.top_k).reshape(-1, shape.top_k) % len(ring)
    return rng.permutation(ring[place_TK].astype(np.int64), axis=0)


def _weighted(shape: WorkloadShape, hot: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws K distinct experts for each token: the experts with the K largest values of log weight + Gumbel noise. A hot
    expert has HEAT times the weight of another expert."""
    weight_E = np.ones(shape.num_experts)
    weight_E[hot] = HEAT
    score_TE = np.log(weight_E) + rng.gumbel(size=(shape.num_tokens, shape.num_experts))
    return np.argsort(-score_TE, axis=1, kind="stable")[:, : shape.top_k].astype(np.int64)


def _even(shape: WorkloadShape) -> tuple[int, ...]:
    edges = [source * shape.num_tokens // shape.num_shards for source in range(shape.num_shards + 1)]
    return tuple(end - start for start, end in pairwise(edges))


def _ragged(shape: WorkloadShape, fixed: np.random.Generator) -> tuple[int, ...]:
    """Returns the source ranks' numbers of tokens, in random order. Each number is a third of the next larger number,
    up to rounding; the largest number also includes the remainder."""
    share_S = 3.0 ** -np.arange(shape.num_shards)
    tokens_S = np.floor(share_S / share_S.sum() * shape.num_tokens).astype(np.int64)
    tokens_S[0] += shape.num_tokens - tokens_S.sum()
    return tuple(int(tokens) for tokens in tokens_S[fixed.permutation(shape.num_shards)])
