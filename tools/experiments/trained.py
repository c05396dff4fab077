"""Loads the checkpoints of a finished run, averages them, and computes the training cost up to each step."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.config.schema import Config
from moe_dist.inference.loaded_run import CheckpointReader
from moe_dist.model.transformer import Transformer
from moe_dist.train.build import TrainingPlan


class TrainedRun:
    """Reads the checkpoints of the run in `folder` into one model, which holds all experts (EP = 1)."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._directory = CheckpointDirectory(folder / "checkpoints")
        self._reader = CheckpointReader(folder / "checkpoints", config, torch.device("cpu"))
        self.model, self.placement = self._reader.model, self._reader.placement

    def steps(self) -> list[int]:
        """Returns the steps of the existing checkpoints, rising."""
        return sorted(self._directory.steps())

    @torch.no_grad()
    def load(self, steps: Sequence[int]) -> Transformer:
        """Loads the mean weights of these checkpoints into the model, and returns the model.

        The sum is in float64. Thresholds of routers are averaged too; integer counts are those of the last checkpoint.

        Raises:
            DataError: a checkpoint is damaged, or the base of its adapters is missing.
        """
        sums: dict[str, torch.Tensor] = {}
        for step in steps:
            self._reader.read(self._directory.path_of(step))
            for name, tensor in self._reader.state.tensors().items():
                if tensor.is_floating_point():
                    sums[name] = sums.get(name, 0.0) + tensor.to(torch.float64)  # a copy of the model with 8 bytes a weight
        if len(steps) > 1:
            for name, tensor in self._reader.state.tensors().items():
                if name in sums:
                    tensor.copy_(sums[name] / len(steps))
        return self.model

    def keep_only_last(self) -> None:
        """Removes all checkpoints but the newest."""
        self._directory.remove_beyond(1, self.steps()[-1])


@dataclass(frozen=True)
class Spent:
    """The training cost up to a step."""

    tokens: int = 0  # without padding
    flops: float = 0.0  # forward and backward, by moe_dist.plan.flops from the measured active experts
    seconds: float = 0.0  # training steps alone, without evaluations, checkpoints and starts


def spent_by_step(metrics: Path, plan: TrainingPlan, before: Spent) -> dict[int, Spent]:
    """Returns the cost after each step, including the cost `before` the run."""
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
    """Returns the active experts a token in each group, and the share of tokens of each group."""
    prefix = "moe/experts_per_token/"
    experts = {key.removeprefix(prefix): value or 0.0 for key, value in scalars.items() if key.startswith(prefix)}
    tokens_G = [sum(column) for column in zip(*arrays["tokens_LG"], strict=True)]
    total = max(1.0, sum(tokens_G))
    return experts, {name: tokens / total for name, tokens in zip(experts, tokens_G, strict=True)}
