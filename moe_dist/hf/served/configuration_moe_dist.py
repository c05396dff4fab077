"""Configuration of a model that moe_dist trained. It needs transformers only."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class MoeDistConfig(PreTrainedConfig):
    """Sizes and kinds of a decoder with groups of experts.

    Attributes:
        intermediate_size: Width of the FFN in layers without experts.
        first_moe_layer, moe_layer_step: Every `moe_layer_step`-th layer from `first_moe_layer` on has experts.
        sliding_window: Number of tokens that a token sees, itself included, in layers of the type `sliding_attention`.
        rope_pairs: Which of n values of a head rotate together: `halves` (i and i + n / 2) or `adjacent` (2 i and 2 i + 1).
        attention: `kind` of attention: `grouped_query`, `sinks` (grouped-query with a learned score beside the tokens'
            scores), or `latent` with the widths `q_rank` (null: no latent of queries), `kv_rank` and `value_dim`. With
            `latent`, `head_dim` is the width of queries and keys, whose last values rotate; `scaled` multiplies latents by
            sqrt(`hidden_size` / width of the latent).
        projection_bias: Attention projections that have a bias: `none`, `qkv` or `qkvo`.
        qk_norm: RMSNorm of queries and keys: `none`, over each `head`, or over the `full` projection.
        expert_groups: For each group of experts `token_ids` (ranges [first, last + 1] of its token ids; null for a single
            group), `num_experts`, `num_null`, `num_identity`, `num_constant`, `top_k` and `ffn_dim`.
        experts: `kind` of FFN experts: `ffn`, or `clamped_ffn` with biases, the factor `alpha` and the bound `limit`.
        router: `kind` and its options. `top_k` scores by a softmax, `group_limited` by sigmoids. In `top_p`, `relu`,
            `threshold`, `predicted_k`, `expert_threshold` and `expert_choice` the number of choices depends on the token.
        shared_expert_intermediate_size: Width of the shared expert, which computes every token; 0 without a shared expert.
        moe_shortcut: Whether the output of routed experts is added after the next layer.
        shared_expert_gate: Whether a sigmoid gate scales the output of the shared expert.
        mixture_of_depths: `first`, `every` and `causal` of mixture-of-depths layers; null without such layers.
    """

    model_type = "moe_dist"
    hidden_act = "silu"  # read by Qwen2MoeMLP
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = 1024
    hidden_size: int = 64
    intermediate_size: Any = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: Any = None
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: Any = None
    rope_pairs: str = "halves"
    layer_types: Any = None
    sliding_window: int | None = None
    attention: Any = None
    projection_bias: str = "none"
    qk_norm: str = "none"
    first_moe_layer: int = 0
    moe_layer_step: int = 1
    moe_shortcut: bool = False
    expert_groups: Any = None
    experts: Any = None
    router: Any = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    mixture_of_depths: Any = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention is None:
            self.attention = {"kind": "grouped_query"}
        if self.experts is None:
            self.experts = {"kind": "ffn"}
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def moe_layers(self):
        return range(self.first_moe_layer, self.num_hidden_layers, self.moe_layer_step)

    @property
    def depth_layers(self):
        depths = self.mixture_of_depths
        return range(depths["first"], self.num_hidden_layers, depths["every"]) if depths else ()


__all__ = ["MoeDistConfig"]
