"""Trains a small VQ model of transformers (Janus's) on pictures, in minutes on CPU.

Shape letters: N pictures, B pictures of a batch, S pixels of a side, K codes, D values of a code's vector, P cells.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_dist.errors import ConfigError
from moe_dist.runtime.progress import Report

_RESTART = 50  # steps between two restarts of unused codes
_HALF = [0.5, 0.5, 0.5]  # mean and deviation of the image processor, so that values are from -1 to 1
# Fields of the image processor. It pads pictures that are not square.
PROCESSOR = {"image_processor_type": "JanusImageProcessor", "image_mean": _HALF, "image_std": _HALF, "min_size": 8}


@dataclass(frozen=True)
class VQRecipe:
    """Settings of the training. `size` is `cells` times a power of two."""

    size: int = 64  # pixels of a side
    cells: int = 8  # codes of a side
    codes: int = 512
    channels: int = 32
    steps: int = 1500
    batch: int = 16
    lr: float = 2e-3
    seed: int = 0

    @property
    def sides(self) -> dict[str, int]:
        """Height and width in pixels."""
        return {"height": self.size, "width": self.size}

    def __post_init__(self) -> None:
        levels = math.log2(self.size / self.cells)
        if levels < 1 or levels != int(levels):
            raise ConfigError(
                f"--size {self.size}, --cells {self.cells}: the size must be 2, 4, 8 or 16 times the cells; give --size "
                f"{self.cells * 8}"
            )


def make_model(recipe: VQRecipe) -> Any:
    """Makes the model with random weights."""
    from transformers import JanusVQVAE, JanusVQVAEConfig

    levels = int(math.log2(recipe.size // recipe.cells)) + 1
    config = JanusVQVAEConfig(
        base_channels=recipe.channels,
        channel_multiplier=[1] * levels,
        num_res_blocks=0,  # none but the middle's in the encoder, and one a level in the decoder, which does the work
        latent_channels=recipe.channels,
        embed_dim=16,
        num_embeddings=recipe.codes,
        num_patches=recipe.cells,
    )
    torch.manual_seed(recipe.seed)
    return JanusVQVAE(config)


def train(model: Any, pictures_N3SS: Tensor, recipe: VQRecipe, report: Report) -> None:
    """Trains a model on pictures, float [N, 3, S, S] from -1 to 1. The vectors of codes stay on the unit sphere, because
    Janus's decoder normalises them and its encoder does not."""
    model.train()
    weight_KD = model.quantize.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.05)
    rng = np.random.default_rng(recipe.seed)
    used_K = torch.zeros(recipe.codes, dtype=torch.bool)
    for step in range(recipe.steps):
        pictures_B = pictures_N3SS[rng.integers(len(pictures_N3SS), size=recipe.batch)]
        flipped_B = torch.from_numpy(rng.random(recipe.batch) < 0.5)[:, None, None, None]
        pictures_B = torch.where(flipped_B, pictures_B.flip(3), pictures_B)
        made_BDcc = F.normalize(model.quant_conv(model.encoder(pictures_B)), dim=1)
        if step % _RESTART == 0 and step < recipe.steps // 2:
            _restart(weight_KD, used_K, made_BDcc, rng)
            used_K.zero_()
        quantised_BDcc, loss, codes_P = model.quantize(made_BDcc)
        used_K[codes_P] = True
        drawn_B = model.decoder(model.post_quant_conv(quantised_BDcc))
        error = F.mse_loss(drawn_B, pictures_B) + F.l1_loss(drawn_B, pictures_B)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            weight_KD.copy_(F.normalize(weight_KD, dim=1))
        report("train", step + 1, recipe.steps)
    model.eval()


@torch.no_grad()
def _restart(weight_KD: Tensor, used_K: Tensor, made_BDcc: Tensor, rng: np.random.Generator) -> None:
    """Gives unused codes the vectors of random cells."""
    made_PD = made_BDcc.permute(0, 2, 3, 1).flatten(0, 2)
    unused = (~used_K).nonzero().flatten()
    weight_KD[unused] = made_PD[torch.from_numpy(rng.integers(len(made_PD), size=len(unused)))]
