"""Carries the modality ids of tokens through Megatron in its argument `padding_mask`.

Megatron passes `padding_mask` from GPTModel.forward to every MoE layer. Megatron's own layers expect a bool tensor that is
True for padding. moe_dist also accepts a tensor of modality ids. Shape letters: B sequences, S positions, s positions on
this rank (S / TP under sequence parallelism), T = s x B tokens on this rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.megatron.settings import GUIDE

PADDING = -1


def modality_of_tokens(tokens_BS: Tensor, ranges: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """Returns the modality id of each token, int64 [B, S], for Megatron's argument `padding_mask`.

    Args:
        ranges: For each modality its vocabulary ranges [first, end), in the order in which the settings' groups list the
            modalities. A token outside all ranges counts as padding and gets the id -1.
    """
    ids_BS = torch.full_like(tokens_BS, PADDING, dtype=torch.int64)
    for modality, parts in enumerate(ranges):
        for first, end in parts:
            ids_BS = torch.where((tokens_BS >= first) & (tokens_BS < end), modality, ids_BS)
    return ids_BS


def groups_of_rank(
    mask_BS: Tensor | None, group_of_modality_M: Tensor, *, length: int, batch: int, tp_rank: int, tp_size: int
) -> Tensor:
    """Returns the expert group of each token of this rank, int64 [T], in the order of hidden states; -1 for padding.

    Megatron scatters the mask over TP ranks only on the first pipeline stage, and only if this stage computes the
    embeddings. A mask that is not scattered covers the whole sequence, and this function takes the rank's slice. It needs
    no communication. Raises ConfigError if there are several modalities but no ids, or if the ids do not have the shape of
    the hidden states. An id of no modality raises ConfigError on a CPU. On CUDA it fails an assertion on the device,
    without a host sync.

    Args:
        mask_BS: Integer modality ids (-1 for padding), bools that are True for padding, or None if there is no padding.
        group_of_modality_M: int64, the group of each modality, then a -1, which the id -1 of padding selects.
        length, batch: s and B.
    """
    num_modalities = group_of_modality_M.shape[0] - 1
    if mask_BS is None or mask_BS.dtype == torch.bool:
        if num_modalities > 1:
            given = "none" if mask_BS is None else "a boolean mask"
            raise ConfigError(
                f"padding_mask: got {given}, but there are {num_modalities} modalities; pass their ids as an int64 tensor "
                "[batch, sequence] to the model's forward, on every pipeline stage",
                see=GUIDE,
            )
        if mask_BS is None:
            return group_of_modality_M[:1].expand(length * batch)
        mask_BS = torch.where(mask_BS, PADDING, 0)
    if mask_BS.shape == (batch, length * tp_size) and tp_size > 1:
        mask_BS = mask_BS[:, tp_rank * length : (tp_rank + 1) * length]  # this rank's part of the sequence
    if mask_BS.shape != (batch, length):
        raise ConfigError(
            f"padding_mask: shape {tuple(mask_BS.shape)} must be [batch={batch}, {length}] or the whole sequence "
            f"[batch={batch}, {length * tp_size}]; pass the ids of the micro-batch's tokens, sliced for context "
            "parallelism as the tokens are",
            see=GUIDE,
        )
    _check_ids(mask_BS, num_modalities)
    return group_of_modality_M[mask_BS.t().reshape(-1).to(torch.int64)]  # transposed, because hidden states are [s, B, D]


def _check_ids(ids_BS: Tensor, num_modalities: int) -> None:
    """Refuses ids of no modality. An id below -1 would silently index from the end."""
    known = ((ids_BS >= PADDING) & (ids_BS < num_modalities)).all()
    if ids_BS.device.type != "cpu":
        torch._assert_async(known, "padding_mask: a modality id is neither -1 nor that of a modality")  # pyright: ignore[reportPrivateImportUsage]
    elif not known:
        lowest, highest = (int(each) for each in ids_BS.aminmax())
        raise ConfigError(
            f"padding_mask: modality ids from {lowest} to {highest} must be in [0, {num_modalities}), or {PADDING} for "
            f"padding; pass the position of each token's modality in the order of the groups, and {PADDING}, not the label "
            "of ignored positions, for padding",
            see=GUIDE,
        )
