"""Finds the routers of any transformers model in the list of modules whose outputs the model can record."""

from torch import nn


def recorded_routers(model: nn.Module) -> tuple[type, ...]:
    """Returns the router classes that a transformers model lists in `_can_record_outputs`."""
    found: list[type] = []
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        recorders = recorders if isinstance(recorders, list | tuple) else [recorders]
        found += [getattr(each, "target_class", each) for each in recorders]
    return tuple(found)
