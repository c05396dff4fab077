"""Absent choices in models that run without expert parallelism."""

from typing import Any

from torch import nn


def allow_absent_choices(model: nn.Module) -> None:
    """Makes the experts of a model on one rank skip choices with the index `num_experts`.

    Routers with null choices need this call if `ep_size` is 1. Without it, transformers 5.24 leaves rows of `grouped_mm`
    uninitialised for such choices: the loss is right, and the gradients are garbage. Its "eager" and "batched_mm" raise an
    IndexError or need the call as well. Under `ep_implementation="moe_dist"` absent choices never reach the experts.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "_is_expert_parallel"):
            module._is_expert_parallel = True
