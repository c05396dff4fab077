"""Computes dispatched rows by a family's own module of experts. Imports no transformers.

Shape letters: R rows on this rank for this rank's experts, D hidden size, Q (token, expert) pairs computed here.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moe_dist.comm.collectives import from_host
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.kernels.torch_kernels import gather_rows, weighted_row_sum


def compute_pairs(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor], weights: Iterable[Tensor], rows: DispatchedRows, layout: PairLayout
) -> Tensor:
    """Returns for each row the weighted sum of its pairs' outputs, [R, D].

    Args:
        forward: The module's forward, which takes tokens, experts and weights. It gets each pair as a token with a single
            choice of weight 1, so it never sees a choice of another rank's expert.
        weights: The module's parameters.
    """
    rows_RD, row_Q = rows.rows_RD, layout.row_of_pair_Q
    x_QD = gather_rows(rows_RD, row_Q)
    if row_Q.shape[0]:
        counts = from_host(layout.slot_counts, torch.int64, row_Q.device)
        expert_Q = torch.arange(len(counts), device=row_Q.device).repeat_interleave(counts, output_size=row_Q.shape[0])
        x_QD = forward(x_QD, expert_Q[:, None], x_QD.new_ones(x_QD.shape[0], 1))
    else:
        # Other ranks wait for a gradient of each weight, so an empty slice gives a gradient of 0. With recomputation they
        # also wait for this rank's exchange, which begins when backward reads the tensors that the sum below saves.
        for weight in weights:
            if weight.numel():  # FSDP2 has no gradients for empty stacks
                x_QD = x_QD + weight[:0].sum().to(x_QD.dtype)
    return weighted_row_sum(x_QD, rows.weight_Q, row_Q, rows_RD.shape[0]).to(rows_RD.dtype)
