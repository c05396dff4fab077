"""Makes one record for each step and shows the record through sinks. `attach` records a model that another trainer
trains."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_dist.monitor.attached import attach as attach


def __getattr__(name: str) -> Any:
    if name != "attach":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moe_dist.monitor.attached import attach  # imported late, because some modules of this package need no torch

    return attach
