"""Loads an imported model on one rank into memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.directory import find_checkpoint
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import CheckpointState, RankLayout, capture
from moe_dist.config.load import load_config
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.initialise import initialise
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model


def load_imported(folder: Path) -> tuple[Transformer, CheckpointState]:
    """Returns the imported model with its weights, and the state that holds both."""
    config = load_config(folder / "config.yaml", ["parallel.device=cpu", "parallel.precision=fp32"])
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=1, token_mix={})
    model = build_model(config, placement, ep_rank=0, ep_group=None)
    initialise(model, placement, ep_rank=0, device=torch.device("cpu"), seed=9, std=0.5)
    values: dict[str, Any] = {"config": config.model_dump(mode="json")}
    state = capture(model, None, RankLayout(placement), values=values)
    manager(folder).load(find_checkpoint(folder), state)
    return model, state


def manager(folder: Path) -> CheckpointManager:
    """Returns the manager of a folder's checkpoints for one rank."""
    return CheckpointManager(folder, keep=1, lease_check=lambda: None)


@torch.no_grad()
def logits_of(model: Transformer, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """Returns logits [B, S, V] of documents of one modality, and the number of (token, expert) pairs in all layers."""
    zeros, (batch, length) = torch.zeros_like(tokens_BS), tokens_BS.shape
    logits, reports = model(tokens_BS, torch.arange(length).expand(batch, -1), zeros, zeros)
    return logits, sum(report.sent.pairs for report in reports)
