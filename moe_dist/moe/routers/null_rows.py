"""Null rows of a router as copies of its true rows (AdaMoE, arXiv 2406.13233, section 4.2)."""

import torch
from torch import Tensor

from moe_dist.moe.routers.top_k import GroupGate


@torch.no_grad()
def copy_true_rows(gate: GroupGate) -> int:
    """Tiles the true rows [n, D] over the null ones [m, D], m a multiple of n; returns m, 0 where there are none."""
    true_nD, null_mD = gate.get_parameter("true"), dict(gate.named_parameters()).get("null")
    if not isinstance(null_mD, Tensor):
        return 0
    null_mD.copy_(true_nD.repeat(null_mD.shape[0] // true_nD.shape[0], 1))
    return null_mD.shape[0]
