"""The models of a finished run on this one process, and the mean of its last checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import Part, RankLayout, capture
from moe_dist.config.schema import Config
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import expert_groups
from moe_dist.train.base_weights import load_base
from moe_dist.train.build import build_model, freeze, saved_part


class TrainedRun:
    """Reads the checkpoints of a run into one model, over and over.

    Args:
        folder: Of the run.
        config: Of the run; its experts are all here (EP = 1).
    """

    def __init__(self, folder: Path, config: Config) -> None:
        groups = expert_groups(config.model.moe)
        self.placement = ExpertPlacement(groups, (tuple(expert for group in groups for expert in group.experts),))
        self._shelf = CheckpointDirectory(folder / "checkpoints")
        self._manager = CheckpointManager(folder / "checkpoints", keep=1, lease_check=lambda: None)
        with torch.device("meta"):
            self.model = build_model(config, self.placement, ep_rank=0, ep_group=None)
        device = torch.device("cpu")
        initialise(self.model, self.placement, ep_rank=0, device=device, seed=0, std=config.model.init_std)
        freeze(self.model, config)
        self.model.eval()
        self._part: Part = saved_part(config)
        self._base_is_there = False

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, rising."""
        return sorted(self._shelf.steps())

    def load(self, steps: Sequence[int]) -> Transformer:
        """The model with the mean weights of these checkpoints, summed in float64: thresholds are averaged as well, counts
        and the like are those of the last.

        Raises:
            DataError: a checkpoint is damaged, or adapters lack their base.
        """
        layout = RankLayout(self.placement)
        state = capture(self.model, None, layout, part=self._part)
        sums: dict[str, torch.Tensor] = {}
        for step in steps:
            path = self._shelf.path_of(step)
            restored = self._manager.load(path, state)
            if self._part == "trained" and not self._base_is_there:
                load_base(restored.values, path, self._manager, self.model, layout)
                self._base_is_there = True
            for name, tensor in state.tensors().items():
                if tensor.is_floating_point():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + tensor.detach().to(torch.float64)
        if len(steps) > 1:
            with torch.no_grad():
                for name, tensor in state.tensors().items():
                    if name in sums:
                        tensor.copy_(sums[name] / len(steps))
        return self.model

    def keep_only_last(self) -> None:
        """Removes all checkpoints but the newest."""
        self._shelf.remove_beyond(1, self.steps()[-1])
