"""Attention within the documents of a sequence for Megatron's SelfAttention, also on CPU and over context-parallel ranks.

Masks and rotary angles come in Megatron's argument `attention_mask`. Megatron's own rotary embedding is off. Shape letters:
s positions on this rank, S positions of the whole sequence, B sequences, H query heads, d head width, r rotated values of a
head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moe_dist.megatron.tensors import LATENT_DIMS
from moe_dist.model.attention import AttentionMask, attend, attend_with_sinks, dense_mask, make_mask
from moe_dist.model.layers import ModelArgs, RopePairs, rotary_table, rotate


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


@dataclass(frozen=True)
class View:
    """A micro-batch as the attention layers of a rank see it. It is no tuple, because in bf16 Megatron casts all tensors of
    a tuple.

    Attributes:
        masks: For each width of a sliding window, the mask for this rank's queries and all keys.
        rotary: Cosines and sines for this rank's positions, [B, 1, s, r / 2].
    """

    masks: Mapping[int | None, AttentionMask]
    rotary: tuple[Tensor, Tensor]


def view_of_rank(documents_BS: Tensor, positions_BS: Tensor, own_s: Tensor, args: ModelArgs) -> View:
    """Returns the view of a rank that has the positions `own_s` of the sequences. If it does not have all positions, each
    mask is dense: S s bytes per sequence. `positions_BS` restart at 0 at each document, and are 0 for padding."""
    length = documents_BS.shape[1]
    masks = {
        window: make_mask(documents_BS, positions_BS, window)
        if len(own_s) == length
        else dense_mask(documents_BS, positions_BS, window)[:, :, own_s]
        for window in set(args.windows)
    }
    table = rotary_table(positions_BS, args.rope_dim or args.head_dim, args.rope_base, args.rope_scaling)
    cos, sin = (part[:, :, own_s] for part in table)
    return View(masks, (cos, sin))


def gather_positions(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gathers a tensor [s, ...] over the context-parallel ranks, in the order of the sequence. Backward sums gradients."""
    if group.size() == 1:
        return local
    whole = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    return whole[order_of_ranks(whole.shape[0], group.size()).to(whole.device)]


class DocumentAttention(MegatronModule):
    """Replaces Megatron's DotProductAttention, with the same arguments. With context parallelism, forward gathers keys and
    values over the ranks, and backward sums the gradients of keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        window: int | None,
        pairs: RopePairs,
        sinks: bool,
        **__: Any,
    ) -> None:
        super().__init__(config)
        self.cp_group, self.window, self.sinks = pg_collection.cp, window, None
        self.pairs: RopePairs = pairs
        if sinks:
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.sinks = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.sinks, is_parallel=True, dim=0, stride=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: View, **_: Any) -> Tensor:
        """Returns [s, B, H d] for queries, keys and values [s, B, heads, d]."""
        view, sinks = attention_mask, self.sinks
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        q, k = (rotate(each, view.rotary, self.pairs) for each in (q, k))
        k, v = (gather_positions(each.permute(2, 0, 1, 3), self.cp_group).permute(1, 2, 0, 3) for each in (k, v))
        mask = view.masks[self.window]
        o = attend(q, k, v, mask) if sinks is None else attend_with_sinks(q, k, v, sinks.to(q.dtype), mask)
        return o.permute(2, 0, 1, 3).flatten(2)


class LatentAttention(MegatronModule):
    """Replaces Megatron's SelfAttention by this project's latent attention. A tensor-parallel rank computes the latents of
    all its positions, and its heads. Context-parallel ranks gather latents instead of keys and values.

    Args:
        args: Sizes of the whole model.
        make: Makes the attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        args: ModelArgs,
        make: Callable[[ModelArgs], nn.Module],
        window: int | None,
        **__: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group, self.cp_group, self.window = pg_collection.tp, pg_collection.cp, window
        heads = args.num_heads // self.tp_group.size()
        self.own: Any = make(replace(args, num_heads=heads, num_kv_heads=heads))
        self.own.norm = nn.Identity()  # Megatron applies its own input_layernorm
        for name, parameter in self.own.named_parameters():
            dim = LATENT_DIMS[name]
            parameter.sequence_parallel = dim is None and config.sequence_parallel  # sums the heads' gradients over TP
            if dim is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)

    def forward(self, hidden_states: Tensor, attention_mask: View, **_: Any) -> tuple[Tensor, None]:
        """Returns the output [s / TP, B, D] and, in place of a bias, None."""
        parallel, view = self.tp_group.size() > 1, attention_mask
        x = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group) if parallel else hidden_states
        q, *entries = self.own._project(x.transpose(0, 1), view.rotary)
        k, v = (gather_positions(each.permute(2, 0, 1, 3), self.cp_group).permute(1, 2, 0, 3) for each in entries)
        o = self.own._attend(q, k, v, view.masks[self.window], None).transpose(0, 1).contiguous()
        return reduce_scatter_to_sequence_parallel_region(o, group=self.tp_group) if parallel else o, None
