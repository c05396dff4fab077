"""Attention within the documents of a sequence for Megatron's SelfAttention, also on CPU and over context-parallel ranks.

The mask of `moe_dist.model.attention` comes in Megatron's argument `attention_mask`. Shape letters: s positions on this
rank, S positions of the whole sequence, B sequences, H query heads, d head width.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_dist.model.attention import AttentionMask, attend, dense_mask, make_mask


def positions_of_rank(length: int, cp_rank: int, cp_size: int) -> Tensor:
    """Returns the positions of a sequence that are on a context-parallel rank, int64 [length / cp_size]. As in Megatron's
    rotary embedding, the sequence is cut into 2 x cp_size pieces. The rank has two of them: piece `cp_rank` counted from
    the start, and piece `cp_rank` counted from the end. All ranks thus have equally many (query, key) pairs."""
    if cp_size == 1:
        return torch.arange(length)
    pieces = torch.arange(length).chunk(2 * cp_size)
    return torch.cat([pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]])


def order_of_ranks(length: int, cp_size: int) -> Tensor:
    """Returns the index [length] that restores the sequence's order after the positions of all ranks are joined."""
    return torch.cat([positions_of_rank(length, rank, cp_size) for rank in range(cp_size)]).argsort()


def mask_of_rank(documents_BS: Tensor, cp_rank: int, cp_size: int) -> AttentionMask:
    """Returns the mask for this rank's queries and all keys of the sequences. With context parallelism the mask is dense:
    S^2 / cp_size bytes per sequence."""
    if cp_size == 1:
        return make_mask(documents_BS)
    own = positions_of_rank(documents_BS.shape[1], cp_rank, cp_size).to(documents_BS.device)
    return dense_mask(documents_BS)[:, :, own]


class DocumentAttention(MegatronModule):
    """Replaces Megatron's DotProductAttention, with the same arguments. With context parallelism, forward gathers keys and
    values over the ranks, and backward sums the gradients of keys and values."""

    def __init__(self, config: TransformerConfig, *_: Any, pg_collection: ProcessGroupCollection, **__: Any) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: AttentionMask, **_: Any) -> Tensor:
        """Returns [s, B, H d] for queries, keys and values [s, B, heads, d]. The mask comes from `mask_of_rank`."""
        if (size := self.cp_group.size()) > 1:
            key, value = self._gathered(key, size), self._gathered(value, size)
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return attend(q, k, v, attention_mask).permute(2, 0, 1, 3).flatten(2)

    def _gathered(self, local: Tensor, size: int) -> Tensor:
        whole = gather_from_sequence_parallel_region(local, group=self.cp_group)
        return whole[order_of_ranks(whole.shape[0], size).to(whole.device)]
