"""Finds the routers of a transformers model by its own interface, in any family."""

from torch import nn


def recorded_routers(model: nn.Module) -> tuple[type, ...]:
    """Returns the router classes that a transformers model names among the outputs that it can record."""
    found: list[type] = []
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        recorders = recorders if isinstance(recorders, list | tuple) else [recorders]
        found += [getattr(each, "target_class", each) for each in recorders]
    return tuple(found)
