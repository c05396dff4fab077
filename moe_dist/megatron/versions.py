"""Functions that differ between versions of megatron-core: 0.16 and 0.19 are tested."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

# Arguments: name, this rank's share of the value, layer number, number of layers, group over which the shares are summed.
Record = Callable[[str, Tensor, int, int, dist.ProcessGroup], None]


def tracker() -> Record:
    """Returns the function that adds a value to Megatron's tracker, which reduces and prints the value."""
    if find_spec("megatron.core.transformer.moe.moe_logging") is None:  # megatron-core 0.16
        return _record_by_function
    return _record_in_object


def _record_in_object(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    moe_logging: Any = import_module("megatron.core.transformer.moe.moe_logging")
    metrics = moe_logging.get_moe_metrics_tracker()
    metrics.record(name, value, layer, num_layers, reduce_group=group, needs_dp_avg=False)


def _record_by_function(name: str, value: Tensor, layer: int, num_layers: int, group: dist.ProcessGroup) -> None:
    moe_utils: Any = import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.save_to_aux_losses_tracker(name, value, layer, num_layers, reduce_group=group, reduce_group_has_dp=True)


def clear_tracker() -> None:
    """Empties Megatron's tracker, which is a module global."""
    if find_spec("megatron.core.transformer.moe.moe_logging") is None:  # megatron-core 0.16
        moe_utils: Any = import_module("megatron.core.transformer.moe.moe_utils")
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        import_module("megatron.core.transformer.moe.moe_logging").destroy_moe_metrics_tracker()


def shared_expert_module(stock: Any, **options: Any) -> Any:
    """Builds the shared expert of Megatron's own MoE layer. `stock` describes Megatron's layer: as a ModuleSpec, or in
    later versions as a functools.partial."""
    submodules = stock.keywords["submodules"] if isinstance(stock, partial) else stock.submodules
    shared: Any = submodules.shared_experts
    return shared(**options) if isinstance(shared, partial) else build_module(shared, **options)  # pyright: ignore


def plain_optimizers(optimizer: Any) -> list[Any]:
    """Returns the parts of Megatron's optimizer: the optimizer of dense parameters, then the optimizer of experts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
