"""Loads the models of a finished run on this process, and the mean of its last checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_dist.checkpoint.directory import CheckpointDirectory
from moe_dist.config.schema import Config
from moe_dist.inference.loaded_run import CheckpointReader
from moe_dist.model.transformer import Transformer


class TrainedRun:
    """Reads the checkpoints of a run repeatedly into one model.

    Args:
        folder: Folder of the run.
        config: Configuration of the run; this process holds all experts (EP = 1).
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._directory = CheckpointDirectory(folder / "checkpoints")
        self._reader = CheckpointReader(folder / "checkpoints", config, torch.device("cpu"))
        self.model, self.placement = self._reader.model, self._reader.placement

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, rising."""
        return sorted(self._directory.steps())

    @torch.no_grad()
    def load(self, steps: Sequence[int]) -> Transformer:
        """The model with the mean weights of these checkpoints, summed in float64. Thresholds are averaged too; counts are
        those of the last checkpoint.

        Raises:
            DataError: a checkpoint is damaged, or the base of its adapters is missing.
        """
        sums: dict[str, torch.Tensor] = {}
        for step in steps:
            self._reader.read(self._directory.path_of(step))
            for name, tensor in self._reader.state.tensors().items():
                if tensor.is_floating_point():
                    sums[name] = sums.get(name, 0.0) + tensor.to(torch.float64)
        if len(steps) > 1:
            for name, tensor in self._reader.state.tensors().items():
                if name in sums:
                    tensor.copy_(sums[name] / len(steps))
        return self.model

    def keep_only_last(self) -> None:
        """Removes all checkpoints but the newest."""
        self._directory.remove_beyond(1, self.steps()[-1])
