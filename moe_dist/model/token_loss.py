"""Computes the cross entropy of each token from hidden states and the output weight, without storing all logits.

Shape letters: B sequences, S positions, D hidden size, V words of the vocabulary, N tokens and v words of one tile, P parts
of v words.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_TOKENS = 4096  # largest number of tokens of a tile: 134 MB in fp32 with 8,192 words; at most four tiles exist


def tiled_token_losses(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, words: int) -> Tensor:
    """Returns `layers.token_losses(x W^T, labels)`, computed in tiles. A tile has the logits of `words` words for at most
    TILE_TOKENS tokens of one sequence. Backward computes the logits again.

    The size of a tile depends neither on the number of sequences nor on the ranks. So a token's loss and gradient are
    bit-equal in batches of any number of sequences. Sums over tiles are fp32 for every dtype of x.

    Args:
        weight_VD: Output weight, which is converted to the dtype of x.
        labels_BS: int64, below V. Negative labels are ignored.
    """
    return _TiledLosses.apply(x_BSD, weight_VD, labels_BS, words)  # pyright: ignore[reportReturnType]


class _TiledLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, words: int) -> Tensor:
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        chosen_BS = torch.zeros(labels_BS.shape, dtype=dtype, device=x_BSD.device)  # the logit of each label
        log_z_PBS = []
        for first, part_vD in _parts(weight_VD, words):
            part_vD = part_vD.to(x_BSD.dtype)
            log_z_PBS.append(torch.empty_like(chosen_BS))
            for tile in _tiles(labels_BS):
                logits_Nv = F.linear(x_BSD[tile], part_vD).to(dtype)
                column_N1, inside_N1 = _columns(labels_BS[tile], first, len(part_vD))
                log_z_PBS[-1][tile] = logits_Nv.logsumexp(1)
                chosen_BS[tile] += torch.where(inside_N1, logits_Nv.gather(1, column_N1), 0.0)[:, 0]
        log_z_BS = torch.stack(log_z_PBS).logsumexp(0)
        ctx.save_for_backward(x_BSD, weight_VD, labels_BS, log_z_BS)
        ctx.words = words
        return torch.where(labels_BS < 0, 0.0, log_z_BS - chosen_BS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BS: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_BSD, weight_VD, labels_BS, log_z_BS = ctx.saved_tensors
        dtype = log_z_BS.dtype
        scale_BS = torch.where(labels_BS < 0, 0.0, gradient_BS)
        x_gradient = torch.zeros_like(x_BSD, dtype=dtype)
        weight_gradient = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        for first, part_vD in _parts(weight_VD, ctx.words):
            part_vD = part_vD.to(x_BSD.dtype)
            part_gradient = torch.zeros_like(part_vD, dtype=dtype)
            for tile in _tiles(labels_BS):
                column_N1, inside_N1 = _columns(labels_BS[tile], first, len(part_vD))
                error_Nv = F.linear(x_BSD[tile], part_vD).to(dtype).sub_(log_z_BS[tile][:, None]).exp_()  # probabilities
                error_Nv.scatter_(
                    1, column_N1, error_Nv.gather(1, column_N1) - inside_N1.to(dtype)
                )  # subtracts 1 from the label's probability
                error_Nv = error_Nv.mul_(scale_BS[tile][:, None]).to(x_BSD.dtype)
                x_gradient[tile] += error_Nv @ part_vD
                if weight_gradient is not None:
                    part_gradient += error_Nv.t() @ x_BSD[tile]
            if weight_gradient is not None:
                weight_gradient[first : first + len(part_vD)] = part_gradient  # the fp32 sum is rounded once
        return x_gradient.to(x_BSD.dtype), weight_gradient, None, None


def _parts(weight_VD: Tensor, words: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the first word of each part of the vocabulary, and the part's rows of the output weight."""
    yield from ((first, weight_VD[first : first + words]) for first in range(0, len(weight_VD), words))


def _tiles(labels_BS: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields indices that divide [B, S] into parts of at most TILE_TOKENS tokens of one sequence."""
    num_sequences, length = labels_BS.shape
    for sequence in range(num_sequences):
        yield from ((sequence, slice(first, first + TILE_TOKENS)) for first in range(0, length, TILE_TOKENS))


def _columns(labels_N: Tensor, first: int, words: int) -> tuple[Tensor, Tensor]:
    """Returns two tensors [N, 1]: each label's index among the `words` words from `first` on, and whether the label is one
    of these words."""
    column_N = labels_N - first
    inside_N = (column_N >= 0) & (column_N < words) & (labels_N >= 0)
    return column_N.clamp(0, words - 1)[:, None], inside_N[:, None]
