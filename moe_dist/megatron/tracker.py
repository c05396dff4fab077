"""Access to Megatron's tracker of MoE losses, which reduces and prints them; hides differences between versions."""

import importlib.util

import torch.distributed as dist
from torch import Tensor

from moe_dist.megatron.aux_terms import Record


def tracker() -> Record:
    """A function that adds a value to Megatron's tracker: an object in newer versions, a function in 0.16."""
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
