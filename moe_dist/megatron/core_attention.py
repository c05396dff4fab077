"""Attention within the documents of a sequence for Megatron's SelfAttention, also on CPU and over context-parallel ranks.

Masks and rotary angles come in Megatron's argument `attention_mask`. Megatron's own rotary embedding is off. Shape letters:
s positions on this rank, S positions of the whole sequence, B sequences, H query heads, d head width, r rotated values of a
head.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moe_dist.config.model_schema import ModelSection
from moe_dist.model.attention import AttentionMask, attend, dense_mask, make_mask
from moe_dist.model.layers import RopePairs, rotary_table, rotate


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


class View(NamedTuple):
    """A micro-batch as the attention layers of a rank see it.

    Attributes:
        masks: For each width of a sliding window, the mask for this rank's queries and all keys.
        rotary: Cosines and sines for this rank's positions, [s, B, 1, r / 2].
    """

    masks: Mapping[int | None, AttentionMask]
    rotary: tuple[Tensor, Tensor]
    pairs: RopePairs


def view_of_rank(documents_BS: Tensor, positions_BS: Tensor, own_s: Tensor, model: ModelSection) -> View:
    """Returns the view of a rank that has the positions `own_s` of the sequences. If it does not have all positions, each
    mask is dense: S s bytes per sequence. `positions_BS` restart at 0 at each document, and are 0 for padding."""
    length = documents_BS.shape[1]
    masks = {
        window: make_mask(documents_BS, positions_BS, window)
        if len(own_s) == length
        else dense_mask(documents_BS, positions_BS, window)[:, :, own_s]
        for window in set(model.windows)
    }
    scaling = model.rope_scaling and model.rope_scaling.build()
    table = rotary_table(positions_BS, model.rope_dim or model.resolved_head_dim, model.rope_base, scaling)
    cos, sin = (part[:, :, own_s].permute(2, 0, 1, 3) for part in table)
    return View(masks, (cos, sin), model.rope_pairs)


class DocumentAttention(MegatronModule):
    """Replaces Megatron's DotProductAttention, with the same arguments. With context parallelism, forward gathers keys and
    values over the ranks, and backward sums the gradients of keys and values."""

    def __init__(
        self, config: TransformerConfig, *_: Any, pg_collection: ProcessGroupCollection, window: int | None, **__: Any
    ) -> None:
        super().__init__(config)
        self.cp_group, self.window = pg_collection.cp, window

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: View, **_: Any) -> Tensor:
        """Returns [s, B, H d] for queries, keys and values [s, B, heads, d]."""
        view = attention_mask
        query, key = (rotate(each, view.rotary, view.pairs) for each in (query, key))
        if (size := self.cp_group.size()) > 1:
            key, value = self._gathered(key, size), self._gathered(value, size)
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        return attend(q, k, v, view.masks[self.window]).permute(2, 0, 1, 3).flatten(2)

    def _gathered(self, local: Tensor, size: int) -> Tensor:
        whole = gather_from_sequence_parallel_region(local, group=self.cp_group)
        return whole[order_of_ranks(whole.shape[0], size).to(whole.device)]
