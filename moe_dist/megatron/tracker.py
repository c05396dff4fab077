"""Megatron's tracker of MoE losses, which it reduces and prints itself: one function for the versions that differ."""

import importlib.util

import torch.distributed as dist
from torch import Tensor

from moe_dist.megatron.aux_terms import Record


def tracker() -> Record:
    """Adds a value to Megatron's tracker. Since 0.17 or later it is an object of its own module; before, a function."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        return _record_in_object
    return _record_by_function


def _record_in_object(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    from megatron.core.transformer.moe.moe_logging import (  # pyright: ignore[reportMissingImports]
        get_moe_metrics_tracker,
    )

    get_moe_metrics_tracker().record(name, value, layer, num_layers, reduce_group=group, needs_dp_avg=False)


def _record_by_function(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

    save_to_aux_losses_tracker(name, value, layer, num_layers, reduce_group=group, reduce_group_has_dp=True)
