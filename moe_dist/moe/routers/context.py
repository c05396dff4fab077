"""Defines the values that a router's constructor gets in addition to the fields of its configuration section."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.selection import SelectionScope
from moe_dist.placement.placement import ExpertGroup

OWN_TOKENS = SelectionScope()  # only the tokens of this rank compete


@dataclass(frozen=True)
class RouterContext:
    """The values that every router gets. A router may ignore each of these values except `capacity`.

    Attributes:
        capacity: Limits the number of pairs of each expert in training; None for no limit. Evaluation drops no pair.
        kernels: Functions that may replace the router's own operations.
        seed, layer: Random draws depend on these two numbers. `layer` is the layer's index in the model.
        place: Index of the layer among the MoE layers.
        selection_scope: The ranks whose tokens compete with each other, if experts choose tokens.
        known_counts: Whether the dispatcher can use numbers of (token, expert) pairs that are known before routing.
    """

    hidden_dim: int
    groups: Sequence[ExpertGroup]
    capacity: Capacity | None = None
    kernels: RowKernels = TORCH
    seed: int = 0
    layer: int = 0
    place: int = 0
    selection_scope: SelectionScope = OWN_TOKENS
    known_counts: bool = False
