"""Offers the MoE layer to Megatron-Core as a layer spec for GPTModel, with Megatron's groups, DDP, optimizer and
checkpoints.

Megatron is imported at the first access to one of the names in `_MODULE_OF`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.megatron.decoder_layer import decoder_layer as decoder_layer
    from moe_dist.megatron.decoder_layer import decoder_layer_spec as decoder_layer_spec
    from moe_dist.megatron.modality import modality_of_tokens as modality_of_tokens
    from moe_dist.megatron.settings import ExpertSettings as ExpertSettings
    from moe_dist.megatron.settings import read_settings as read_settings

_MODULE_OF = {
    "ExpertSettings": "settings",
    "decoder_layer": "decoder_layer",
    "decoder_layer_spec": "decoder_layer",
    "modality_of_tokens": "modality",
    "read_settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
