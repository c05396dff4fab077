"""Lists the measured points, and draws the routing (expert choices) at each point. There is a base point; every other
point changes one factor of it.

Shape letters: T tokens of a rank, E experts, K choices per token, W ranks. The choices depend only on (seed, rank, point).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from research.gpu_bench.token_imbalance import WORKLOADS, WorkloadShape, workload_step

ABSENT = -1
HOT_EXPERTS = 4  # number of experts that get most choices in a skewed routing; "95%:4": 4 experts get 95 % of the choices
Policy = Literal["contiguous", "pinned", "interleaved"]


@dataclass(frozen=True)
class Point:
    """The sizes and the routing of one measurement."""

    tokens: int = 4096  # number of tokens of each rank
    hidden: int = 512
    experts: int = 32
    top_k: int = 2  # number of distinct experts that are drawn for each token
    null: float = 0.5  # fraction of the choices that become null (no expert)
    hot: float | None = None  # fraction of the choices that HOT_EXPERTS experts get; None if all experts are equally likely
    image: float | None = None  # fraction of image tokens, which choose in the second half of the experts; None: one group
    policy: Policy = "contiguous"  # expert e is on rank e W // E (contiguous, pinned) or on rank e mod W (interleaved)
    workload: str | None = None  # one of the workloads W0 to W7; its routing replaces the random routing


@dataclass(frozen=True)
class Choices:
    """A rank's routing at a point."""

    drawn_TK: np.ndarray  # int64, K distinct experts of each token, before choices become null
    taken_TK: np.ndarray  # drawn_TK with ABSENT for null choices
    equal_active_TK: np.ndarray  # has as many expert choices as taken_TK in total, but spreads them evenly over the tokens
    weight_TK: np.ndarray  # float32 routing weights


BASE = Point()
DROPLESS = replace(BASE, null=0.0)

SIZES: Mapping[str, tuple[int, ...]] = {
    "tokens": (256, 1024, 2048, 4096, 8192, 16384),
    "hidden": (256, 512, 1024, 2048),
    "experts": (8, 16, 32, 64, 128),
    "top_k": (1, 2, 4, 8),
}
NULL = (0.0, 0.25, 0.5, 0.75, 0.9)
HOT = (None, 0.3, 0.5, 0.8, 0.95)
IMAGE = (0.1, 0.3, 0.5, 0.7, 0.9)


def sweeps() -> Mapping[str, Sequence[tuple[str, Point]]]:
    """Returns the points of each sweep. Maps the name of a sweep to (label, point) pairs."""
    made: dict[str, list[tuple[str, Point]]] = {}
    for suffix, base in (("", BASE), (", no nulls", DROPLESS)):
        for field, values in SIZES.items():
            points = [(f"{value}", replace(base, **{field: value})) for value in values]
            made[f"{field.replace('_', '-')}{suffix}"] = points
    made["null fraction"] = [(f"{null:g}", replace(BASE, null=null)) for null in NULL]
    made["skew"] = [("uniform" if hot is None else f"{hot:.0%}:{HOT_EXPERTS}", replace(BASE, hot=hot)) for hot in HOT]
    policies: tuple[Policy, ...] = ("pinned", "interleaved")
    for policy in policies:
        made[f"image share, {policy}"] = [(f"{image:g}", replace(BASE, image=image, policy=policy)) for image in IMAGE]
    made["workload"] = [(name, replace(DROPLESS, workload=name)) for name in WORKLOADS]
    return made


def quick_sweeps() -> Mapping[str, Sequence[tuple[str, Point]]]:
    """Returns very small points that test all code paths. Times measured at these points mean nothing."""
    small = Point(tokens=64, hidden=16, experts=8)
    return {
        "tokens": [(f"{tokens}", replace(small, tokens=tokens)) for tokens in (32, 64)],
        "tokens, no nulls": [("64", replace(small, null=0.0))],
        "skew": [("95%:4", replace(small, hot=0.95))],
        "top-k": [("1", replace(small, top_k=1))],
        "image share, interleaved": [("0.5", replace(small, image=0.5, policy="interleaved"))],
        "workload": [("W4", replace(small, null=0.0, workload="W4"))],
    }


def slots(point: Point, world_size: int) -> tuple[tuple[int, ...], ...]:
    """Returns the experts of each rank."""
    if point.policy == "interleaved":
        return tuple(tuple(range(rank, point.experts, world_size)) for rank in range(world_size))
    edges = [rank * point.experts // world_size for rank in range(world_size + 1)]
    return tuple(tuple(range(edges[rank], edges[rank + 1])) for rank in range(world_size))


def draw(point: Point, *, rank: int, world_size: int, seed: int) -> Choices:
    """Draws the expert choices of one rank."""
    rng = np.random.default_rng([seed, rank, zlib.crc32(repr(point).encode())])
    if point.workload is not None:
        shape = WorkloadShape(point.tokens * world_size, point.experts, point.top_k, world_size)
        step = workload_step(point.workload, seed=seed, step=4, shape=shape)  # workload W7 has hot experts in step 4
        rows = step.rows_of(rank)
        drawn, weight = step.expert_TK[rows], step.weight_TK[rows].astype(np.float32)
    else:
        drawn = _distinct(_scores(point, rng), point.top_k)
        weight = rng.uniform(0.1, 1.0, drawn.shape).astype(np.float32)
    taken, equal_active = drawn.copy(), drawn.copy()
    num_null = round(point.null * drawn.size)
    taken.flat[rng.choice(drawn.size, num_null, replace=False)] = ABSENT
    kept, tokens = drawn.size - num_null, len(drawn)
    per_token = np.full(tokens, kept // max(1, tokens))
    per_token[rng.permutation(tokens)[: kept - per_token.sum()]] += 1
    equal_active[np.arange(point.top_k) >= per_token[:, None]] = ABSENT
    width = int(per_token.max()) if tokens else point.top_k
    return Choices(drawn, taken, equal_active[:, : max(1, width)], weight)


def _scores(point: Point, rng: np.random.Generator) -> np.ndarray:
    """Returns for each token and expert the log probability of the expert, plus Gumbel noise, float64 [T, E]. The experts
    with a token's K largest scores are a random draw without replacement."""
    weight = np.ones(point.experts)
    if point.hot is not None:
        weight[:HOT_EXPERTS] = point.hot / HOT_EXPERTS
        weight[HOT_EXPERTS:] = (1 - point.hot) / (point.experts - HOT_EXPERTS)
    scores = np.log(weight) + rng.gumbel(size=(point.tokens, point.experts))
    if point.image is not None:
        is_image = rng.permutation(point.tokens) < round(point.image * point.tokens)
        of_image = np.arange(point.experts) >= point.experts // 2
        scores[is_image[:, None] != of_image] = -np.inf
    return scores


def _distinct(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Returns for each token the K experts with the highest scores, highest first."""
    best = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]  # O(E) per token, faster than a full sort
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1).astype(np.int64)
