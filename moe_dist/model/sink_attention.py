"""Grouped-query attention with sinks (gpt-oss; StreamingLLM, arXiv 2309.17453): a head may attend to nothing.

    p_t = exp(s_t) / (exp(a) + sum over the tokens u that may be seen of exp(s_u)),  o = sum over t of p_t v_t

s are the scores, and a is the head's learned sink. Shape letters: B sequences, S queries, C keys, H query heads, d head
width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from moe_dist.model.attention import Attention, AttentionMask, _compiled, attend
from moe_dist.model.layers import ModelArgs
from moe_dist.moe.routing.types import GlobalBatchInfo


class SinkAttention(Attention):
    """Grouped-query attention with sinks. The parameter `sinks` [H] has the sink of each head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        self.sinks = nn.Parameter(torch.empty(args.num_heads))

    def _attend(
        self, q: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, batch_info: GlobalBatchInfo | None
    ) -> Tensor:
        out = attend_with_sinks(q, key, value, self.sinks.to(q.dtype), mask)
        return self._linear("o", out.transpose(1, 2).flatten(2), batch_info)


def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, mask: AttentionMask) -> Tensor:
    """Returns attention with sinks, [B, H, S, d]. `attend` describes all other arguments."""
    if not isinstance(mask, Tensor):
        flex: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
        gqa, sums = q.shape[1] != k.shape[1], AuxRequest(lse=True)
        out, more = flex(q, k, v, block_mask=mask.blocks, enable_gqa=gqa, return_aux=sums)
        return out * (more.lse - sinks_H[:, None]).sigmoid()[..., None].to(out.dtype)
    # Adds one key, whose value is 0. An additional channel of queries and keys makes the sink the score of this key.
    scale = q.shape[-1] ** -0.5
    channel = (sinks_H / scale)[:, None, None].expand(*q.shape[:-1], 1)
    k = F.pad(k, (0, 1, 0, 1))
    k[..., -1, -1] = 1.0
    return attend(torch.cat([q, channel], dim=-1), k, F.pad(v, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=True), scale)
