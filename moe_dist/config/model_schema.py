"""The schema of the model: groups of experts, router, balance, mixture of depths. `schema` has the whole."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from moe_dist.config import controllers, experts, routers
from moe_dist.config.controllers.base import ControllerSection
from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.ffn import FFNExpertsSection
from moe_dist.config.kinds import kinds_in
from moe_dist.config.lora_schema import AttentionLoRASection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.section import Count, Decay, Experts, GroupName, Layers, Name, NullExperts, Section, Violation

if TYPE_CHECKING:  # type checkers see the type of the base
    AnyRouter = RouterSection
    AnyController = ControllerSection
    AnyExperts = ExpertsSection
else:
    AnyRouter = kinds_in(routers, RouterSection)
    AnyController = kinds_in(controllers, ControllerSection)
    AnyExperts = kinds_in(experts, ExpertsSection)


class GroupSection(Section):
    """One group of experts: a token is routed inside the group of its modality."""

    num_experts: Experts = Field(description="True experts of the group (n).")
    num_null: NullExperts = 0
    """Null experts of the group (m): choices that cost nothing. 0 is plain top-k."""
    num_identity: Count = 0
    """Identity experts: they add the token's normed input times its weight, on its own rank."""
    num_constant: Count = 0
    """Constant experts (MoE++): a learned vector mixed with the input, on the token's own rank."""
    top_k: PositiveInt
    """Choices a token makes among all experts of its group, null ones included (k). With router.kind=expert_choice the
    number of experts that take a token on average, unless router.capacity says so."""
    ffn_dim: PositiveInt
    """Hidden width of each expert's SwiGLU (F); with model.moe.experts.kind=lora of the frozen FFN."""
    modalities: tuple[Name, ...] = ()
    """Modalities routed to this group; empty means the one that has the group's name."""

    @property
    def num_zero_computation(self) -> int:
        """Number of identity and constant experts."""
        return self.num_identity + self.num_constant

    def violations(self) -> Iterator[Violation]:
        free = self.num_zero_computation
        if self.top_k <= self.num_experts + self.num_null + free:
            return
        problem = (
            f"top_k={self.top_k} is larger than the group's {self.num_experts} true + {self.num_null} null"
            f"{f' + {free} free' if free else ''} choices; lower top_k, or raise num_experts or num_null"
        )
        yield Violation(("top_k", "num_experts", "num_null", "num_identity", "num_constant"), problem)


class CapacitySection(Section):
    """A bound of the (token, expert) pairs that an expert takes while training; what lies beyond it is dropped."""

    factor: PositiveFloat
    """An expert takes ceil(factor x k x T / columns) pairs of its group's T tokens; 1 is the even share."""
    drop: Literal["probability", "position"] = "probability"
    """Pairs of least probability go first, or those of the last tokens; ties stay with the earlier token."""
    scope: Literal["rank"] = "rank"
    """Tokens that compete for an expert's room: those of one rank's micro-batch."""


class MoESection(Section):
    """Expert groups, their router, and which layers hold them."""

    groups: dict[GroupName, GroupSection] = Field(min_length=1, description="Groups of experts by name.")
    experts: AnyExperts = Field(default_factory=FFNExpertsSection)
    """What a true expert is: an FFN, or LoRA over a frozen FFN."""
    router: AnyRouter = Field(default_factory=TopKRouterSection, description="How tokens choose experts.")
    capacity: CapacitySection | None = None
    """Bound of the pairs an expert takes while training; null for none."""
    balance: tuple[AnyController, ...] = ()
    """Controllers of the router's selection bias, one of a kind; what they say is added up."""
    every: PositiveInt = Field(default=1, description="Every how many layers a layer is MoE; the others are dense.")
    first: Count = Field(default=0, description="Index of the first MoE layer.")
    shared_ffn_dim: Count = 0
    """Hidden width of a shared expert that sees every token; 0 for none."""
    shared_gate: bool = False
    """Multiply the shared expert by a sigmoid of one number a token (Qwen2-MoE)."""

    def violations(self) -> Iterator[Violation]:
        if not self.shared_gate or self.shared_ffn_dim:
            return
        problem = "shared_gate=true needs a shared expert; set shared_ffn_dim to its width, or shared_gate=false"
        yield Violation(("shared_gate", "shared_ffn_dim"), problem)

    @field_validator("router", mode="before")
    @classmethod
    def _top_k_unless_said(cls, value: Any) -> Any:
        """`router: {normalise: none}` means the default kind, which has that key."""
        return {"kind": "top_k", **value} if isinstance(value, dict) and "kind" not in value else value


class MixtureOfDepthsSection(Section):
    """Mixture of depths: some layers compute a share of the tokens alone, and the others pass them by the residual."""

    every: PositiveInt = Field(default=2, description="Every how many layers a layer chooses its tokens.")
    first: Count = Field(default=0, description="Index of the first layer that does.")
    capacity: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """Share of the selection scope's tokens that such a layer computes (c); MoMa takes 0.25."""
    scope: Literal["rank", "ep_group", "world"] = "rank"
    """Tokens among which a layer chooses: those of one rank's micro-batch, of an EP group's, or of all ranks'. The latter
    two exchange a score for each token in each such layer."""
    causal: Literal["threshold", "auxiliary"] = "auxiliary"
    """How evaluation and generation judge a token without looking at later ones: by a threshold that follows the score of
    the last token taken, or by an auxiliary router, trained beside the model."""
    threshold_decay: Decay = 0.99
    """Decay a step of the running mean behind the threshold; its memory is 1 / (1 - it)."""


class ModelSection(Section):
    """The transformer's shape."""

    hidden_dim: PositiveInt = Field(description="Width of the residual stream (D).")
    num_layers: Layers = Field(description="Transformer layers.")
    num_heads: PositiveInt = Field(description="Query heads.")
    num_kv_heads: PositiveInt = Field(description="Key-value heads; fewer than num_heads is grouped-query attention.")
    head_dim: PositiveInt | None = Field(default=None, description="Width of a head; default hidden_dim / num_heads.")
    vocab_size: PositiveInt = Field(description="Rows of the embedding, text and image codes together.")
    max_seq_len: PositiveInt = Field(description="Longest sequence the model is made for, in tokens.")
    dense_ffn_dim: PositiveInt | None = Field(default=None, description="FFN width of layers without experts.")
    rope_base: PositiveFloat = Field(default=10000.0, description="Base of the rotary position frequencies.")
    norm_eps: PositiveFloat = Field(default=1e-5, description="Epsilon of RMSNorm.")
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: over each head (Qwen3) or over the whole projection (OLMoE)."""
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """Biases of the attention's projections: none; of queries, keys and values (Qwen2); of the output too."""
    tie_embeddings: bool = Field(default=False, description="Use the embedding as output projection.")
    init_std: PositiveFloat = Field(default=0.02, description="Standard deviation of the initial weights.")
    moe: MoESection
    attention_lora: AttentionLoRASection | None = None
    """LoRA adapters on the attention, trained by train.only=adapters; null for none."""
    mixture_of_depths: MixtureOfDepthsSection | None = None
    """Layers that compute a share of the tokens alone (mixture of depths); null for none."""

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return tuple(range(self.moe.first, self.num_layers, self.moe.every))

    @property
    def depth_layers(self) -> tuple[int, ...]:
        """Indices of the mixture-of-depths layers."""
        depths = self.mixture_of_depths
        return () if depths is None else tuple(range(depths.first, self.num_layers, depths.every))

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - len(self.moe_layers)

    @property
    def attention_widths(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each of the attention's projections."""
        dim, width = self.hidden_dim, self.resolved_head_dim
        heads, kv_heads = self.num_heads * width, self.num_kv_heads * width
        return {"q": (dim, heads), "k": (dim, kv_heads), "v": (dim, kv_heads), "o": (heads, dim)}

    @property
    def has_adapters(self) -> bool:
        """Whether there are adapters on a frozen base: LoRA experts, or LoRA on the attention."""
        return self.moe.experts.over_frozen_ffn or self.attention_lora is not None

    @property
    def largest_dropout(self) -> float:
        """Largest dropout of all adapters; 0 without any."""
        return max(self.moe.experts.input_dropout, self.attention_lora.dropout if self.attention_lora else 0.0)

    def violations(self) -> Iterator[Violation]:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            problem = f"num_heads={heads} must be a multiple of num_kv_heads={kv_heads}"
            yield Violation(("num_heads", "num_kv_heads"), problem)
        head_keys = ("hidden_dim", "num_heads", "head_dim")
        if self.head_dim is None and self.hidden_dim % heads:
            problem = f"hidden_dim={self.hidden_dim} must be a multiple of num_heads={heads}; or set head_dim"
            yield Violation(head_keys, problem)
        elif self.resolved_head_dim % 2:
            yield Violation(head_keys, f"head_dim={self.resolved_head_dim} must be even: rotary positions turn pairs")
        if not self.moe_layers:
            problem = f"moe.first={self.moe.first} leaves no MoE layer among num_layers={self.num_layers}"
            yield Violation(("moe.first", "num_layers"), problem)
        elif len(self.moe_layers) < self.num_layers and self.dense_ffn_dim is None:
            problem = "dense_ffn_dim is needed: some layers hold no experts (moe.every, moe.first)"
            yield Violation(("dense_ffn_dim", "moe.every", "moe.first", "num_layers"), problem)
        dense = sorted(set(self.depth_layers) - set(self.moe_layers))
        if self.mixture_of_depths is not None and not self.depth_layers:
            problem = (
                f"mixture_of_depths.first={self.mixture_of_depths.first} leaves no layer that chooses among num_layers="
                f"{self.num_layers}; lower it, or set mixture_of_depths to null"
            )
            yield Violation(("mixture_of_depths.first", "num_layers"), problem)
        elif dense:
            problem = (
                f"mixture_of_depths: layer {dense[0]} would choose its tokens and holds no experts (moe.first="
                f"{self.moe.first}, moe.every={self.moe.every}); set mixture_of_depths.first={self.moe.first} and "
                "mixture_of_depths.every to a multiple of moe.every"
            )
            yield Violation(("mixture_of_depths.first", "mixture_of_depths.every", "moe.first", "moe.every"), problem)
