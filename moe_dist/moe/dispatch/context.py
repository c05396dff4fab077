"""Defines the values that a dispatcher's constructor gets in addition to the fields of its configuration section."""

from dataclasses import dataclass

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.kernels.interface import RowKernels
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class DispatchContext:
    """The values that every dispatcher gets.

    Attributes:
        all_to_all: The all-to-all of the EP group. Its size must be the placement's number of ranks.
        max_receive_rows: Largest number of rows that a rank may receive in a layer (with two hops, in each hop); None for
            no limit. A rank never receives more than (ep - 1) x T rows, the tokens of all other EP ranks.
        kernels: Functions that sum the rows of a token. Triton's kernels also compute the dispatch plan if
            tokens choose their experts.
        hops: The two all-to-alls if rows are dispatched in two hops, else None. The first connects, in the order of nodes,
            the ranks that have the same local index as this rank. The second connects the ranks of this node.
        deterministic: Whether results must be reproducible bit for bit.
        two_batches: Whether a micro-batch is dispatched in two halves.
    """

    placement: ExpertPlacement
    all_to_all: AllToAll
    hidden_dim: int = 0
    max_receive_rows: int | None = None
    kernels: RowKernels = TORCH
    tokens: int = 0
    hops: tuple[AllToAll, AllToAll] | None = None
    deterministic: bool = False
    two_batches: bool = False
