"""moe_dist: expert-parallel training of adaptive, multimodal mixture-of-experts transformers.

With the names in `__all__` you build MoE layers into your own model (docs/api.md). Each name is imported when it is first
used, so that `import moe_dist` alone does not load torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_MODULES = {
    "AllToAll": "moe_dist.comm.all_to_all",
    "AllToAllDispatcher": "moe_dist.moe.dispatch.all_to_all",
    "CommStats": "moe_dist.comm.collectives",
    "DispatchContext": "moe_dist.moe.dispatch.context",
    "ExpertGroup": "moe_dist.placement.placement",
    "ExpertPlacement": "moe_dist.placement.placement",
    "Experts": "moe_dist.moe.experts.experts",
    "LayerReport": "moe_dist.moe.routing.types",
    "MoELayer": "moe_dist.moe.layer",
    "RouterContext": "moe_dist.moe.routers.context",
    "TopKRouter": "moe_dist.moe.routers.top_k",
    **dict.fromkeys(
        (
            *("average_over_ranks", "balance_loss", "build_moe_layer", "clip_gradients", "expert_parameters"),
            *("finish_gradients", "full_state_dict", "load_full_state_dict"),
        ),
        "moe_dist.parallel.own_model",
    ),
}
__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_dist' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
