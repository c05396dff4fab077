"""The cost of a run up to each step: tokens, FLOPs and seconds, from its records."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.train.build import TrainingPlan


@dataclass(frozen=True)
class Spent:
    """Cost up to a step.

    Attributes:
        tokens: Without padding.
        flops: Of forward and backward, by moe_dist.plan.flops from the measured number of experts.
        seconds: Of the steps, without evaluations, checkpoints and starts.
    """

    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def spent_by_step(metrics: Path, plan: TrainingPlan, before: Spent) -> dict[int, Spent]:
    """The cost after each step, including the cost `before` the run."""
    spent, sums = {}, before
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] != "step":
            continue
        scalars = record["scalars"]
        experts, share = _routed(scalars, record["arrays"])
        tokens = before.tokens + int(scalars["optim/tokens"]) - sums.tokens
        flops = sums.flops + tokens * plan.flops_per_token(experts, share)
        sums = Spent(sums.tokens + tokens, flops, sums.seconds + scalars["perf/step_seconds"])
        spent[record["step"]] = sums
    return spent


def _routed(
    scalars: Mapping[str, float], arrays: Mapping[str, list[list[float]]]
) -> tuple[dict[str, float], dict[str, float]]:
    """True experts per token of each group, and each group's share of the tokens."""
    prefix = "moe/experts_per_token/"
    experts = {key.removeprefix(prefix): value or 0.0 for key, value in scalars.items() if key.startswith(prefix)}
    tokens_G = [sum(column) for column in zip(*arrays["tokens_LG"], strict=True)]
    total = max(1.0, sum(tokens_G))
    return experts, {name: tokens / total for name, tokens in zip(experts, tokens_G, strict=True)}
