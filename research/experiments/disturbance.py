"""Disturbs the routers of a trained model. The disturbed model is a positive control, because its routing can certainly be
improved.

Adds Gaussian noise to the router rows of the last MoE layers. Raises the noise until the accuracy on validation questions
has fallen far enough. The undisturbed routers answer more questions right, so tuning the routers alone can regain the
accuracy that the noise took.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.contents import open_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.errors import DataError
from moe_dist.inference.fact import NUM_CHOICES
from moe_dist.inference.loaded_run import CheckpointReader
from moe_dist.model.transformer import Transformer
from moe_dist.train.router_tuning.tuning import router_parameters
from research.experiments.study import DisturbanceSection

CHANCE = 1 / NUM_CHOICES
FOLDER = "disturbed"  # folder of the checkpoint with disturbed routers, in the run's folder


@dataclass
class Noise:
    """Adds noise to router rows. At every scale, the noise has the same directions."""

    rows: Sequence[Tensor]  # router rows, which `add` changes
    seed: int

    def __post_init__(self) -> None:
        self._clean = [each.detach().clone() for each in self.rows]

    @torch.no_grad()
    def add(self, scale: float) -> None:
        """Sets the rows to their undisturbed values plus Gaussian noise. The noise's standard deviation is `scale` times
        the standard deviation of the undisturbed rows."""
        generator = torch.Generator().manual_seed(self.seed)
        for rows, clean in zip(self.rows, self._clean, strict=True):
            rows.copy_(clean + scale * clean.std() * torch.randn(clean.shape, generator=generator))


def router_rows(model: Transformer, layers: Sequence[int]) -> list[Tensor]:
    """Returns the router parameters of the layers with the indices `layers`, ordered by parameter name."""
    return [parameter for _, parameter in sorted(router_parameters(model, layers).items())]


def find_scale(section: DisturbanceSection, accuracy: Callable[[float], float]) -> tuple[float, dict[str, float]]:
    """Returns the first scale of the section at which the accuracy above chance has fallen to `keep` times the accuracy
    above chance without noise. Returns the last scale if there is no such scale. Also returns the accuracy at each tried
    scale, which `accuracy` measures."""
    found = {"0": accuracy(0.0)}
    most = CHANCE + section.keep * (found["0"] - CHANCE)
    for scale in section.scales:
        found[f"{scale:g}"] = accuracy(scale)
        if found[f"{scale:g}"] <= most:
            return scale, found
    return section.scales[-1], found


def disturb(
    reader: CheckpointReader,
    checkpoint: Path,
    out: Path,
    layers: Sequence[int],
    section: DisturbanceSection,
    *,
    seed: int,
    accuracy: Callable[[], float],
) -> dict[str, Any]:
    """Disturbs the routers of a reader's model, and saves the model as the only checkpoint of the folder `out`.

    Args:
        checkpoint: The checkpoint without noise. The new checkpoint gets the same configuration.
        layers: Indices of the layers whose routers are disturbed.
        accuracy: Measures the share of validation questions that the reader's model answers right.

    Raises:
        DataError: `out` holds a checkpoint.
    """
    if (out / "checkpoints").is_dir():
        raise DataError(f"{out}: holds a disturbed checkpoint, maybe of other noise; remove it, and start again")
    contents = open_checkpoint(checkpoint)
    model = reader.read(checkpoint)
    noise = Noise(router_rows(model, layers), seed)

    def measured(scale: float) -> float:
        noise.add(scale)
        return accuracy()

    scale, tried = find_scale(section, measured)
    noise.add(scale)
    step = contents.state.step
    manager = CheckpointManager(out / "checkpoints", keep=1, lease_check=lambda: None)
    manager.save(step, replace(reader.state, values=contents.state.values))
    return {"folder": str(out), "scale": scale, "valid": tried, "layers": list(layers)}
