"""Trains a model of a few weights on one rank, for tests of saving and loading checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import CheckpointState, RankLayout, capture
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

PLACEMENT = ExpertPlacement((ExpertGroup("text", 2, 0, 1, 4, 0, ("text",)),), ((0, 1),))


class SmallRun:
    """A small model in training, and its checkpoint manager."""

    def __init__(self, folder: Path, *, keep: int = 2, width: int = 4, lease: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))
        groups = split_parameters(self.model, weight_decay=0.1)
        self.optimizer: Optimizer = make_optimizer(groups, backend="torch", lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        self.manager = CheckpointManager(folder, keep=keep, lease_check=lease)

    def train(self, steps: int) -> "SmallRun":
        for _ in range(steps):
            x = torch.ones(3, self.model[0].in_features)  # type: ignore[arg-type]
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    def state(self, **values: Any) -> CheckpointState:
        return capture(self.model, self.optimizer, RankLayout(PLACEMENT), values=values, rank_values={"rng": "00"})

    def save(self, step: int, **values: Any) -> Path:
        return self.manager.save(step, self.state(**values))

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())
