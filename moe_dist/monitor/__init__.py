"""Makes a record of each step and shows it through sinks. `attach` records a model that another trainer trains."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "attach":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # imported late, because some modules of this package need no torch
    return import_module("moe_dist.monitor.attached.attach").attach
