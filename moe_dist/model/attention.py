"""The base class of causal attention, and grouped-query attention. `latent_attention.py` has latent attention. Tokens
attend only to tokens of their document, even if a sequence contains several documents.

Shape letters: B sequences, S positions, N new tokens per sequence, H query heads, d head width, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from moe_dist.model.attention_lora import AttentionLoRA
from moe_dist.model.cache import Entry, LayerCache
from moe_dist.model.layers import ModelArgs, Projection, QKNorm, RMSNorm, RopePairs, project, rotate
from moe_dist.moe.routing.draws import recomputed
from moe_dist.moe.routing.types import GlobalBatchInfo


@dataclass(frozen=True)
class FlexMask:
    """Wraps flex attention's block mask, which skips blocks between documents. FSDP2 would flatten an unwrapped mask."""

    blocks: BlockMask


COMPILED_SHAPES = 64  # largest number of shapes for which torch compiles a function
# A mask that is a Tensor is dense: bool [B, 1, S, S], true where a query may attend to a key; S^2 bytes per sequence.
AttentionMask = FlexMask | Tensor


def dense_mask(documents_BS: Tensor, positions_BS: Tensor | None = None, window: int | None = None) -> Tensor:
    length = documents_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril()
    mask_BSS = (documents_BS[:, :, None] == documents_BS[:, None, :]) & causal
    if window is not None:
        assert positions_BS is not None
        mask_BSS &= positions_BS[:, :, None] - positions_BS[:, None, :] < window
    return mask_BSS[:, None]


def flex_mask(documents_BS: Tensor, positions_BS: Tensor | None = None, window: int | None = None) -> FlexMask:
    """Returns `dense_mask` as a block mask. On CUDA its creation is compiled; eager mode would first make a dense mask."""

    def visible(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BS[b, q] == documents_BS[b, k])

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(b, h, q, k) & (positions_BS[b, q] - positions_BS[b, k] < window)  # pyright: ignore

    batch, length = documents_BS.shape
    make = _compiled(create_block_mask) if documents_BS.is_cuda else create_block_mask  # one compilation per shape
    rule = visible if window is None else near
    return FlexMask(make(rule, batch, None, length, length, device=documents_BS.device.type))


def make_mask(documents_BS: Tensor, positions_BS: Tensor | None = None, window: int | None = None) -> AttentionMask:
    """Returns a block mask for flex attention on CUDA. Elsewhere returns a dense mask for scaled_dot_product_attention.

    Args:
        positions_BS: Position of each token in its document; needed with a window.
        window: A token attends only to the last `window` tokens of its document up to and including itself.
    """
    make = flex_mask if documents_BS.is_cuda else dense_mask
    return make(documents_BS, positions_BS, window)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # torch compiles each shape separately, with and without gradient. A run has one shape for whole sequences. Evaluation
    # with mixture of depths adds up to 8 shapes. Beyond a limit of shapes (8 by default), torch would run flex attention
    # uncompiled, with S x S scores.
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None = None) -> Tensor:
    """Returns softmax attention, [B, H, S, d]. If k and v have only H_kv heads, each key-value head serves H / H_kv query
    heads. `scale` multiplies the scores. None means 1 / sqrt(width of q)."""
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1], "scale": scale}
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    flex = _compiled(flex_attention) if q.is_cuda else flex_attention  # eager mode would make S x S scores
    return flex(q, k, v, block_mask=mask.blocks, **options)


class CausalAttention(nn.Module, ABC):
    """Computes norm, attention and output projection. The caller adds the residual.

    A subclass has the projections, and defines the cache's entry for a token.

    Attributes:
        entry: Shapes of the key and of the value that a cache keeps of a token.
        scale: Factor of the scores; None: 1 / sqrt(width of a query).
        rotate, project, norm_and_rotate: Functions of `kernels.interface.DenseKernels`.
    """

    entry: Entry
    scale: float | None = None
    rotate = staticmethod(rotate)
    project = staticmethod(project)
    norm_and_rotate: Callable[..., Tensor | None] = staticmethod(lambda *_: None)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.rope_pairs: RopePairs = args.rope_pairs
        self.recompute = args.recompute_blocks
        self.norm = RMSNorm(args.hidden_dim, args.norm_eps)
        self.adapters: AttentionLoRA | None = None

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, batch_info: GlobalBatchInfo | None = None
    ) -> Tensor:
        """Returns the output [B, S, D] for x [B, S, D]. `batch_info` seeds the dropout of LoRA adapters."""
        if self.recompute and x_BSD.requires_grad:
            return recomputed(self._forward, x_BSD, rotary, mask, batch_info)
        return self._forward(x_BSD, rotary, mask, batch_info)

    def with_cache(
        self, x_BND: Tensor, rotary: tuple[Tensor, Tensor], positions_BN: Tensor, taken_BN: Tensor, cache: LayerCache
    ) -> Tensor:
        """Adds the tokens marked by `taken_BN` to the cache. Then the N new tokens of each sequence attend to the cached
        tokens. The output of an unmarked token is finite but meaningless."""
        q, key, value = self._project(x_BND, rotary)
        cache.append(key, value, positions_BN, taken_BN)  # before attention, so that each new token attends to itself
        key, value, visible = cache.entries(positions_BN, taken_BN)
        return self._attend(q, key, value, visible, None)

    def _forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: AttentionMask, batch_info: GlobalBatchInfo | None
    ) -> Tensor:
        return self._attend(*self._project(x_BSD, rotary, batch_info), mask, batch_info)

    def _attend(
        self, q: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, batch_info: GlobalBatchInfo | None
    ) -> Tensor:
        out = attend(q, *self._expand(key, value, batch_info), mask, self.scale)
        return self._linear("o", out.transpose(1, 2).flatten(2), batch_info)

    @abstractmethod
    def _project(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], batch_info: GlobalBatchInfo | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the rotated queries [B, H, S, d], and the keys and values for a cache, in the shapes of `entry`."""

    def _expand(self, key: Tensor, value: Tensor, batch_info: GlobalBatchInfo | None) -> tuple[Tensor, Tensor]:
        """Computes the keys and values for `attend` from the keys and values of a cache."""
        return key, value

    def _linear(self, name: str, x: Tensor, batch_info: GlobalBatchInfo | None) -> Tensor:
        """Applies the projection `name` to x, with its LoRA adapter if there is one."""
        y = self.get_submodule(name)(x)
        return y if self.adapters is None else self.adapters(name, x, y, batch_info)


class Attention(CausalAttention):
    """Grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        dim, heads, kv_heads = args.hidden_dim, args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
        qk_norm, bias = args.qk_norm, args.attention_bias
        self.head_dim = args.head_dim
        self.entry = ((args.num_kv_heads, args.head_dim), (args.num_kv_heads, args.head_dim))
        self.q = Projection(dim, heads, bias=bias != "none")
        self.k = Projection(dim, kv_heads, bias=bias != "none")
        self.v = Projection(dim, kv_heads, bias=bias != "none")
        self.o = Projection(heads, dim, bias=bias == "qkvo")
        self.qk_norm: QKNorm = qk_norm
        q_dim, k_dim = (args.head_dim, args.head_dim) if qk_norm == "head" else (heads, kv_heads)
        self.q_norm = nn.Identity() if qk_norm == "none" else RMSNorm(q_dim, args.norm_eps)
        self.k_norm = nn.Identity() if qk_norm == "none" else RMSNorm(k_dim, args.norm_eps)

    def _project(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], batch_info: GlobalBatchInfo | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.adapters is None:
            q, k, v = self.project(x_BSD, self.norm, self.q, self.k, self.v)
        else:
            h = self.norm(x_BSD)
            q, k, v = (self._linear(name, h, batch_info) for name in "qkv")
        return self._rotated(q, self.q_norm, rotary), self._rotated(k, self.k_norm, rotary), self._heads(v)

    def _rotated(self, x_BSE: Tensor, norm: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
        turned = None
        if isinstance(norm, RMSNorm):
            x_BSHd = x_BSE.unflatten(-1, (-1, self.head_dim))
            turned = self.norm_and_rotate(x_BSHd, norm.weight, norm.eps, rotary, self.rope_pairs)
        return self.rotate(self._normed_heads(x_BSE, norm), rotary, self.rope_pairs) if turned is None else turned

    def _normed_heads(self, x_BSE: Tensor, norm: nn.Module) -> Tensor:
        # Qwen3 normalises each head after the split into heads. OLMoE normalises the whole projection before the split.
        return norm(self._heads(x_BSE)) if self.qk_norm == "head" else self._heads(norm(x_BSE))

    def _heads(self, x_BSE: Tensor) -> Tensor:
        return x_BSE.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class SinkAttention(Attention):
    """Grouped-query attention with sinks (gpt-oss; StreamingLLM, arXiv 2309.17453): a head may attend to nothing.

        p_t = exp(s_t) / (exp(a) + sum of exp(s_u) over the visible tokens u),  o = sum over t of p_t v_t

    s are the scores, and a is the head's learned sink, an element of the parameter `sinks` [H].
    """

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
