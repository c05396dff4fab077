from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.attention.base import AttentionSection, WholeModel
from moe_dist.config.base.section import PositiveInt, Violation


class GroupedQuerySection(AttentionSection):
    """Grouped-query attention (arXiv 2305.13245): num_kv_heads heads of keys and values serve num_heads heads of
    queries."""

    builds = "moe_dist.model.attention:Attention"
    served = "grouped_query"

    kind: Literal["grouped_query"] = "grouped_query"

    def widths(self, model: WholeModel) -> dict[str, tuple[int, int]]:
        dim, width = model.hidden_dim, model.resolved_head_dim
        heads, kv_heads = model.num_heads * width, model.num_kv_heads * width
        return {"q": (dim, heads), "k": (dim, kv_heads), "v": (dim, kv_heads), "o": (heads, dim)}

    def num_vectors(self, model: WholeModel) -> int:
        dim, width = model.hidden_dim, model.resolved_head_dim
        heads, kv_heads = model.num_heads * width, model.num_kv_heads * width
        norms = {"none": 0, "head": 2 * width, "full": heads + kv_heads}[model.qk_norm]
        return norms + {"none": 0, "qkv": heads + 2 * kv_heads, "qkvo": heads + 2 * kv_heads + dim}[model.attention_bias]

    def score_width(self, model: WholeModel) -> int:
        return 2 * model.num_heads * model.resolved_head_dim

    def kept(self, model: WholeModel, *, frozen: bool) -> int:
        heads = (model.num_heads + model.num_kv_heads) * model.resolved_head_dim
        return heads * (2 if frozen else 3 if model.qk_norm == "none" else 4)

    def rotated(self, model: WholeModel) -> int:
        return (model.num_heads + model.num_kv_heads) * model.resolved_head_dim

    def norms_again(self, model: WholeModel) -> bool:
        return model.attention_bias == "none" and not model.attention_lora


class LatentAttentionSection(AttentionSection):
    """Multi-head latent attention (DeepSeek-V3): queries, keys and values come from narrow latents. The last
    model.rope_dim values of a head's query and key are rotated by RoPE; all heads share the rotated values of a key."""

    builds = "moe_dist.model.latent_attention:LatentAttention"
    served = "latent"

    kind: Literal["latent"] = "latent"
    q_rank: PositiveInt | None = Field(
        default=None, description="Width of the queries' latent. null: queries come from the hidden state."
    )
    kv_rank: PositiveInt = Field(description="Width of the latent of keys and values, which generation caches.")
    value_dim: PositiveInt = Field(description="Width of a head's values. Queries and keys have model.head_dim.")
    scaled: bool = Field(default=False, description="Multiply latents by sqrt(hidden_dim / rank) (LongCat-Flash).")

    def widths(self, model: WholeModel) -> dict[str, tuple[int, int]]:
        dim, heads, rotated = model.hidden_dim, model.num_heads, model.rope_dim or 0
        queries, values = heads * model.resolved_head_dim, heads * self.value_dim
        narrow = {} if self.q_rank is None else {"q_down": (dim, self.q_rank), "q_up": (self.q_rank, queries)}
        return {
            **(narrow or {"q": (dim, queries)}),
            "kv_down": (dim, self.kv_rank + rotated),
            "kv_up": (self.kv_rank, queries - heads * rotated + values),
            "o": (values, dim),
        }

    def num_vectors(self, model: WholeModel) -> int:
        return self.kv_rank + (self.q_rank or 0)

    def score_width(self, model: WholeModel) -> int:
        return model.num_heads * (model.resolved_head_dim + self.value_dim)

    def kept(self, model: WholeModel, *, frozen: bool) -> int:
        latents = self.kv_rank + (self.q_rank or 0)
        return (1 if frozen else 3) * latents + 2 * self.score_width(model)

    def violations_of(self, model: WholeModel) -> Iterator[Violation]:
        yield from super().violations_of(model)
        heads, width, kind = model.num_heads, model.resolved_head_dim, "attention.kind=latent"
        no_part = model.rope_dim is None or model.rope_dim >= width
        broken = {
            "num_kv_heads": (
                model.num_kv_heads != heads,
                f"has keys and values for each of num_heads={heads}; set it to {heads}",
            ),
            "rope_dim": (no_part, f"rotates a part of each head; set an even number below head_dim={width}"),
            "qk_norm": (model.qk_norm != "none", "has norms of its latents alone; set it to none"),
            "attention_bias": (model.attention_bias != "none", "has no biases; set it to none"),
        }
        for name, (is_broken, rule) in broken.items():
            if is_broken:
                value = getattr(model, name)
                shown = "null" if value is None else value
                yield Violation((name, "attention.kind"), f"{name}={shown}: {kind} {rule}")


class SinkAttentionSection(GroupedQuerySection):
    """Grouped-query attention with a sink in each head: a learned score that joins the tokens' scores in the softmax, but
    has no value (gpt-oss)."""

    builds = "moe_dist.model.attention:SinkAttention"
    served = "sinks"

    kind: Literal["sinks"] = "sinks"  # pyright: ignore[reportIncompatibleVariableOverride]

    def num_vectors(self, model: WholeModel) -> int:
        return super().num_vectors(model) + model.num_heads
