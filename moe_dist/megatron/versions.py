"""Functions whose implementation depends on the version of megatron-core."""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

# megatron-core 0.16 stores logged values in a dict of this module, later versions in an object of another module.
_IN_OBJECT = find_spec("megatron.core.transformer.moe.moe_logging") is not None
_LOGGING: Any = import_module(f"megatron.core.transformer.moe.{'moe_logging' if _IN_OBJECT else 'moe_utils'}")


def record(name: str, share: Tensor, layer_number: int, num_layers: int, group: dist.ProcessGroup) -> None:
    """Adds this rank's part of a value to Megatron's tracker, which sums the parts over `group` and prints the sum."""
    if _IN_OBJECT:
        metrics = _LOGGING.get_moe_metrics_tracker()
        metrics.record(name, share, layer_number, num_layers, reduce_group=group, needs_dp_avg=False)
    else:
        options = {"reduce_group": group, "reduce_group_has_dp": True}
        _LOGGING.save_to_aux_losses_tracker(name, share, layer_number, num_layers, **options)


def clear_tracker() -> None:
    """Empties Megatron's tracker, which is a module global."""
    if _IN_OBJECT:
        _LOGGING.destroy_moe_metrics_tracker()
    else:
        _LOGGING.get_moe_layer_wise_logging_tracker().clear()


def shared_expert_module(stock: Any, **options: Any) -> Any:
    """Builds the shared expert from `stock`, Megatron's spec of its MoE layer. The spec is a ModuleSpec or, in later
    versions, a partial."""
    submodules = stock.keywords["submodules"] if isinstance(stock, partial) else stock.submodules
    shared: Any = submodules.shared_experts
    return shared(**options) if isinstance(shared, partial) else build_module(shared, **options)  # pyright: ignore


def plain_optimizers(optimizer: Any) -> list[Any]:
    """Returns Megatron's optimizer as a list: first the optimizer of dense parameters, then any separate one of experts."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
