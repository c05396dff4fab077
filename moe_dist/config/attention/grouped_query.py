from typing import Literal

from moe_dist.config.attention.base import AttentionSection, WholeModel


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
