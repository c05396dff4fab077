"""The sizes of a transformer (`ModelArgs`), and its small parts: norm, projection, SwiGLU, rotary positions.

Each part computes in its input's dtype, and casts its weight to this dtype, because weights may be fp32 and activations
bf16. With FSDP2's mixed precision, weights already have the dtype of activations, so the cast costs nothing.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.model.rope import RopeScaling, frequencies
from moe_dist.placement.parameter_names import Role

QKNorm = Literal["none", "head", "full"]
RopePairs = Literal["halves", "adjacent"]


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of a transformer.

    Attributes:
        moe_layers: Indices of the MoE layers; all other layers have a dense FFN of width `dense_ffn_dim`.
        depth_layers: Indices of the mixture-of-depths layers. Each of them computes only some of the tokens.
        rope_scaling: Function that changes the rotary frequencies for long sequences; None keeps the frequencies.
        rope_dim: RoPE rotates only the first `rope_dim` values of each head. None: all values.
        rope_pairs: The values that rotate together: i and i + rope_dim / 2 (`halves`), or 2 i and 2 i + 1 (`adjacent`).
        windows: Width of each layer's sliding window in tokens, including the token itself. None: the layer has no window.
            If the tuple is empty, no layer has a window.
        qk_norm: RMSNorm of queries and keys: `head` over each head (Qwen3), `full` over all heads together (OLMoE).
        attention_bias: Which attention projections have a bias.
        recompute_blocks: If true, backward recomputes the activations of attention.
        compute_dtype: Dtype of activations.
        loss_words: Number of words of the vocabulary for which the loss computes logits at once. None: all words.
        two_batch_overlap: If true, training alternates between the two halves of a micro-batch (see `two_batches`).
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe_layers: tuple[int, ...]
    depth_layers: tuple[int, ...] = ()
    dense_ffn_dim: int | None = None
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = None
    rope_pairs: RopePairs = "halves"
    windows: tuple[int | None, ...] = ()
    norm_eps: float = 1e-5
    qk_norm: QKNorm = "none"
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    tie_embeddings: bool = False
    compute_dtype: torch.dtype = torch.float32
    recompute_blocks: bool = False
    loss_words: int | None = None
    two_batch_overlap: bool = False


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight over the last dim, in the dtype of x."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def norm_for_router(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the result of `rms_norm` twice: in the dtype of x, and in the dtype in which routers compute."""
    normed = rms_norm(x, weight, eps)
    return normed, normed.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    role = Role.NORM
    function = staticmethod(rms_norm)  # `kernels.choice.use` replaces it

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    role = Role.EMBEDDING


class Projection(nn.Module):
    """Computes x W^T, plus b if there is a bias. The weight is [out, in], and the bias [out]."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def project(x: Tensor, norm: RMSNorm, *projections: Projection) -> tuple[Tensor, ...]:
    """Returns the results of all projections for the normed x."""
    h = norm(x)
    return tuple(projection(h) for projection in projections)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x): the dense FFN, and the shared expert of an MoE layer."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = Projection(dim, ffn_dim)
        self.up = Projection(dim, ffn_dim)
        self.down = Projection(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GatedSwiGLU(SwiGLU):
    """sigmoid(<x, s>) * SwiGLU(x): the shared expert of Qwen2-MoE. `scale` has the weight s [1, D]."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(dim, ffn_dim)
        self.scale = Projection(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x).sigmoid() * super().forward(x)


def rotary_table(
    positions_BS: Tensor, rope_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotary angles, fp32 [B, 1, S, rope_dim / 2] (RoFormer, arXiv 2104.09864, eq. 34)."""
    if scaling is None:
        rates, size = frequencies(rope_dim, base, positions_BS), 1.0
    else:
        rates, size = scaling(rope_dim, base, positions_BS)
    angles = positions_BS[:, None, :, None].to(torch.float32) * rates
    return angles.cos() * size, angles.sin() * size


def rotate(x_BHSd: Tensor, table: tuple[Tensor, Tensor], pairs: RopePairs = "halves") -> Tensor:
    """Rotates pairs of values in each head by the token's angles. A table of r / 2 angles rotates the first r values and
    keeps all others. A pair is i and i + r / 2 (`halves`, as in Llama), or 2 i and 2 i + 1 (`adjacent`)."""
    width = 2 * table[0].shape[-1]
    if width < x_BHSd.shape[-1]:
        return torch.cat([rotate(x_BHSd[..., :width], table, pairs), x_BHSd[..., width:]], dim=-1)
    cos, sin = (part.to(x_BHSd.dtype) for part in table)  # rounded once, from fp32
    first, second = x_BHSd.chunk(2, dim=-1) if pairs == "halves" else (x_BHSd[..., 0::2], x_BHSd[..., 1::2])
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1) if pairs == "halves" else torch.stack(turned, dim=-1).flatten(-2)


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Returns cross entropies [B, S] in fp32 (float64 for a float64 model); 0 where the label is IGNORED (-100)."""
    dtype = torch.promote_types(logits_BSV.dtype, torch.float32)  # makes an fp32 copy of bf16 logits: B x S x V x 4 bytes
    losses = F.cross_entropy(logits_BSV.flatten(0, 1).to(dtype), labels_BS.flatten(), reduction="none")
    return losses.view_as(labels_BS)
