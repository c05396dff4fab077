"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, Kimi K2, LongCat-Flash).

    c_q = norm(W_qd h),  [q_i, q'_i] = W_qu c_q        for each head i; W_q h without a query latent
    [c, k'] = W_kvd h,   [k_i, v_i] = W_kvu norm(c)
    o_i = sum of p_i v_i,   p_i = softmax of (<q_i, k_i> + <R q'_i, R k'>) scale, both over the visible tokens

With scaled latents, norm(x) is sqrt(D / width of x) times the norm (LongCat-Flash, arXiv 2509.01322, section 2.3.1).

R is the rotation by a token's position. All heads share the rotated part k' of the keys. A cache keeps R k' and norm(c) of
each token. Each generation step multiplies all cached latents by W_kvu again.

Shape letters: B sequences, S positions, D hidden size, H heads, d width of a query, r its rotated part, c the latent.
"""

from functools import partial

import torch
from torch import Tensor

from moe_dist.model.attention import CausalAttention
from moe_dist.model.layers import ModelArgs, Projection, RMSNorm
from moe_dist.model.rope import YarnScaling
from moe_dist.moe.routing.types import GlobalBatchInfo

EPS = 1e-6  # eps of the norms of latents; transformers ignores rms_norm_eps for these norms


class ScaledRMSNorm(RMSNorm):
    """RMSNorm times sqrt(D / width), D = `model_dim`."""

    def __init__(self, dim: int, eps: float, *, model_dim: int) -> None:
        super().__init__(dim, eps)
        self.factor = (model_dim / dim) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class LatentAttention(CausalAttention):
    """Multi-head latent attention.

    Args:
        q_rank: Width of the queries' latent. None: queries are a projection of the hidden state, without a latent.
        kv_rank: Width of the latent of keys and values (c).
        value_dim: Width of a head's values.
        scaled: Whether the norms of the latents are scaled.
    """

    def __init__(self, args: ModelArgs, *, q_rank: int | None, kv_rank: int, value_dim: int, scaled: bool = False) -> None:
        super().__init__(args)
        assert args.rope_dim is not None
        dim, heads, plain = args.hidden_dim, args.num_heads, args.head_dim - args.rope_dim
        self.heads = (heads, -1)
        self.query_parts, self.latent_parts = [plain, args.rope_dim], [kv_rank, args.rope_dim]
        self.head_parts = [plain, value_dim]
        self.entry = ((1, args.rope_dim), (1, kv_rank))
        scaling, scale = args.rope_scaling, args.head_dim**-0.5
        if isinstance(scaling, YarnScaling) and scaling.mscale_all_dim is not None:
            scale *= scaling.size(scaling.mscale_all_dim) ** 2
        self.scale = scale
        norm = partial(ScaledRMSNorm, model_dim=dim) if scaled else RMSNorm
        self.q_rank = q_rank
        if q_rank is None:
            self.q = Projection(dim, heads * args.head_dim)
        else:
            self.q_down, self.q_norm = Projection(dim, q_rank), norm(q_rank, EPS)
            self.q_up = Projection(q_rank, heads * args.head_dim)
        self.kv_down, self.kv_norm = Projection(dim, kv_rank + args.rope_dim), norm(kv_rank, EPS)
        self.kv_up = Projection(kv_rank, heads * sum(self.head_parts))
        self.o = Projection(heads * value_dim, dim)

    def _project(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], batch_info: GlobalBatchInfo | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x_BSD)
        if self.q_rank is None:
            q_BSE = self._linear("q", h, batch_info)
        else:
            q_BSE = self._linear("q_up", self.q_norm(self._linear("q_down", h, batch_info)), batch_info)
        plain, turned = q_BSE.unflatten(-1, self.heads).transpose(1, 2).split(self.query_parts, dim=-1)
        latent_BSc, key_BSr = self._linear("kv_down", h, batch_info).split(self.latent_parts, dim=-1)
        query = torch.cat([plain, self.rotate(turned, rotary, self.rope_pairs)], dim=-1)
        return query, self.rotate(key_BSr[:, None], rotary, self.rope_pairs), self.kv_norm(latent_BSc)[:, None]

    def _expand(self, key: Tensor, value: Tensor, batch_info: GlobalBatchInfo | None) -> tuple[Tensor, Tensor]:
        both_BHSe = self._linear("kv_up", value[:, 0], batch_info).unflatten(-1, self.heads).transpose(1, 2)
        plain, values = both_BHSe.split(self.head_parts, dim=-1)
        return torch.cat([plain, key.expand(-1, plain.shape[1], -1, -1)], dim=-1), values
