"""The measured points: a base point, changes of one factor at a time, and the routing at each point.

Shape letters: T tokens of a rank, E experts, K choices per token, W ranks. Choices are drawn from (seed, rank) and the
point.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tools.bench.workloads import WorkloadShape, workload_step

ABSENT = -1
HOT_EXPERTS = 4  # number of experts that a skewed routing prefers, as in "95:4"
Policy = Literal["contiguous", "pinned", "interleaved"]


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        tokens: Tokens of each rank.
        hidden, experts, top_k: Sizes; each token draws `top_k` distinct experts.
        null: Share of null choices.
        hot: Share of the draws that go to HOT_EXPERTS experts; None is uniform.
        image: Share of image tokens, whose experts are the second half; None is one group.
        policy: contiguous (expert e on rank e W // E); with two groups pinned (the same) or interleaved (e mod W).
        workload: One of W0 to W7 instead of a drawn routing.
    """

    tokens: int = 4096
    hidden: int = 512
    experts: int = 32
    top_k: int = 2
    null: float = 0.5
    hot: float | None = None
    image: float | None = None
    policy: Policy = "contiguous"
    workload: str | None = None


@dataclass(frozen=True)
class Choices:
    """A rank's routing at a point.

    Attributes:
        drawn_TK: int64, K distinct experts of each token, before choices became null.
        taken_TK: The same with ABSENT for null choices.
        equal_active_TK: As many true choices in total as `taken_TK`, spread evenly over tokens, without nulls.
        weight_TK: float32 routing weights.
    """

    drawn_TK: np.ndarray
    taken_TK: np.ndarray
    equal_active_TK: np.ndarray
    weight_TK: np.ndarray


BASE = Point()
DROPLESS = replace(BASE, null=0.0)

TOKENS = (256, 1024, 2048, 4096, 8192, 16384)
HIDDEN = (256, 512, 1024, 2048)
EXPERTS = (8, 16, 32, 64, 128)
TOP_K = (1, 2, 4, 8)
NULL = (0.0, 0.25, 0.5, 0.75, 0.9)
HOT = (None, 0.3, 0.5, 0.8, 0.95)
IMAGE = (0.1, 0.3, 0.5, 0.7, 0.9)
WORKLOADS = tuple(f"W{number}" for number in range(8))


def sweeps() -> Mapping[str, Sequence[tuple[str, Point]]]:
    """All points by sweep, each with its label. Megatron-Core's default can run at those labelled `..., no nulls`."""
    made: dict[str, list[tuple[str, Point]]] = {}
    for suffix, base in (("", BASE), (", no nulls", DROPLESS)):
        made[f"tokens{suffix}"] = [(f"{tokens}", replace(base, tokens=tokens)) for tokens in TOKENS]
        made[f"hidden{suffix}"] = [(f"{hidden}", replace(base, hidden=hidden)) for hidden in HIDDEN]
        made[f"experts{suffix}"] = [(f"{experts}", replace(base, experts=experts)) for experts in EXPERTS]
        made[f"top-k{suffix}"] = [(f"{top_k}", replace(base, top_k=top_k)) for top_k in TOP_K]
    made["null fraction"] = [(f"{null:g}", replace(BASE, null=null)) for null in NULL]
    made["skew"] = [("uniform" if hot is None else f"{hot:.0%}:{HOT_EXPERTS}", replace(BASE, hot=hot)) for hot in HOT]
    policies: tuple[Policy, ...] = ("pinned", "interleaved")
    for policy in policies:
        made[f"image share, {policy}"] = [(f"{image:g}", replace(BASE, image=image, policy=policy)) for image in IMAGE]
    made["workload"] = [(name, replace(DROPLESS, workload=name)) for name in WORKLOADS]
    return made


def quick_sweeps() -> Mapping[str, Sequence[tuple[str, Point]]]:
    """The same code paths on very small points, whose times mean nothing."""
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
    """Experts of each rank."""
    if point.policy == "interleaved":
        return tuple(tuple(range(rank, point.experts, world_size)) for rank in range(world_size))
    edges = [rank * point.experts // world_size for rank in range(world_size + 1)]
    return tuple(tuple(range(edges[rank], edges[rank + 1])) for rank in range(world_size))


def draw(point: Point, *, rank: int, world_size: int, seed: int) -> Choices:
    """The routing of one rank."""
    rng = np.random.default_rng([seed, rank, zlib.crc32(repr(point).encode())])
    if point.workload is not None:
        shape = WorkloadShape(point.tokens * world_size, point.experts, point.top_k, world_size)
        step = workload_step(point.workload, seed=seed, step=4, shape=shape)  # a step of W7 with hot experts
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
    """Log probability of each expert for each token, plus Gumbel noise, float64 [T, E]."""
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
    """The K experts of highest score, by falling score: a draw without replacement."""
    best = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1).astype(np.int64)
