"""Decoder-only transformer over text and image tokens in one stream, written for one device.

Shape letters: B sequences, S positions, T = B x S tokens, D hidden size, V vocabulary, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.model.attention import Attention, Bias, QKNorm, make_mask
from moe_dist.model.layers import Projection, RMSNorm, SwiGLU, rotary_table
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import LayerReport


@dataclass(frozen=True)
class ModelArgs:
    """Plain sizes of a transformer.

    Attributes:
        moe_layers: Indices of the layers that hold experts; the others are dense with `dense_ffn_dim`.
        compute_dtype: Dtype of activations; weights are cast to it where they are used.
    """

    vocab_size: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    moe_layers: tuple[int, ...]
    dense_ffn_dim: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: QKNorm = "none"
    attention_bias: Bias = "none"
    tie_embeddings: bool = False
    compute_dtype: torch.dtype = torch.float32
    recompute_blocks: bool = False


class DenseFFN(SwiGLU):
    """Norm and SwiGLU; the caller adds the residual."""

    def __init__(self, dim: int, ffn_dim: int, eps: float) -> None:
        super().__init__(dim, ffn_dim)
        self.norm = RMSNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Layer(nn.Module):
    """x + attention(x), then x + moe(x) or x + ffn(x)."""

    def __init__(self, args: ModelArgs, moe: MoELayer | None) -> None:
        super().__init__()
        self.attention = Attention(
            dim=args.hidden_dim,
            num_heads=args.num_heads,
            num_kv_heads=args.num_kv_heads,
            head_dim=args.head_dim,
            norm_eps=args.norm_eps,
            qk_norm=args.qk_norm,
            bias=args.attention_bias,
            recompute=args.recompute_blocks,
        )
        if moe is not None:
            self.moe = moe
        else:
            self.ffn = DenseFFN(args.hidden_dim, args.dense_ffn_dim or 0, args.norm_eps)
        self.has_experts = moe is not None


class Transformer(nn.Module):
    """Tokens to logits.

    Args:
        args: Sizes.
        make_moe: Called with a layer's index for each layer in `args.moe_layers`; returns its MoE layer.
    """

    def __init__(self, args: ModelArgs, make_moe: Callable[[int], MoELayer]) -> None:
        super().__init__()
        self.args = args
        self.embedding = nn.Embedding(args.vocab_size, args.hidden_dim)
        self.layers = nn.ModuleList(
            Layer(args, make_moe(i) if i in args.moe_layers else None) for i in range(args.num_layers)
        )
        self.norm = RMSNorm(args.hidden_dim, args.norm_eps)
        if not args.tie_embeddings:
            self.output = Projection(args.hidden_dim, args.vocab_size)

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, documents_BS: Tensor, group_BS: Tensor
    ) -> tuple[Tensor, Sequence[LayerReport]]:
        """Logits [B, S, V] in the compute dtype, and one report for each MoE layer.

        Args:
            tokens_BS: int64 ids.
            positions_BS: int64 position inside the document.
            documents_BS: Document of each token; tokens see earlier tokens of their own document only.
            group_BS: int64 expert group of each token, -1 for padding.
        """
        mask = make_mask(documents_BS)
        rotary = rotary_table(positions_BS, self.args.head_dim, self.args.rope_base)
        x_BSD = F.embedding(tokens_BS, self.embedding.weight).to(self.args.compute_dtype)
        reports = []
        for layer in self.layers:
            x_BSD = x_BSD + layer.attention(x_BSD, rotary, mask)  # pyright: ignore[reportCallIssue]
            if layer.has_experts:
                y_TD, report = layer.moe(x_BSD.flatten(0, 1), group_BS.flatten())  # pyright: ignore[reportCallIssue]
                x_BSD = x_BSD + y_TD.view_as(x_BSD)
                reports.append(report)
            else:
                x_BSD = x_BSD + layer.ffn(x_BSD)  # pyright: ignore[reportCallIssue]
        x_BSD = self.norm(x_BSD)
        output = self.embedding.weight if self.args.tie_embeddings else self.output.weight
        return F.linear(x_BSD, output.to(x_BSD.dtype)), reports

    def moe_modules(self) -> list[MoELayer]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]
