"""Defines the section `model`: the transformer, expert groups, router, controllers and mixture of depths."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, JsonValue, PositiveFloat

from moe_dist.config import attention, controllers, experts, rope, routers
from moe_dist.config.attention.base import AttentionSection
from moe_dist.config.attention.kinds import GroupedQuerySection
from moe_dist.config.base.kinds import kinds_in
from moe_dist.config.base.section import (
    Count,
    Decay,
    Experts,
    GroupName,
    Layers,
    Name,
    NullExperts,
    PathText,
    PositiveInt,
    Section,
    Share,
    Violation,
    WholeConfig,
    Width,
)
from moe_dist.config.controllers.base import ControllerSection
from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.ffn import FFNExpertsSection
from moe_dist.config.experts.lora import AttentionLoRASection, HostedLoRASection
from moe_dist.config.rope.base import RopeScalingSection
from moe_dist.config.routers.base import RouterSection
from moe_dist.config.routers.top_k import TopKRouterSection

if TYPE_CHECKING:  # the union is made at run time, so type checkers get the base class instead
    AnyRouter = RouterSection
    AnyController = ControllerSection
    AnyExperts = ExpertsSection
    AnyRopeScaling = RopeScalingSection
    AnyAttention = AttentionSection
else:
    AnyRouter = kinds_in(routers, RouterSection, default="top_k")
    AnyController = kinds_in(controllers, ControllerSection)
    AnyExperts = kinds_in(experts, ExpertsSection)
    AnyRopeScaling = kinds_in(rope, RopeScalingSection)
    AnyAttention = kinds_in(attention, AttentionSection, default="grouped_query")


MAX_EXPERTS = 1 << 19  # largest number of experts in all layers together, null experts included


class GroupSection(Section):
    """One group of experts. A token is routed only to experts in the group of the token's modality."""

    num_experts: Experts = Field(description="True experts of the group (n).")
    num_null: NullExperts = 0
    """Number of null experts of the group (m). Choosing one costs no computation and no communication. 0: plain top-k."""
    num_identity: Count = 0
    """Number of identity experts of the group. On the token's rank, each adds the token's normed input times the routing
    weight."""
    num_constant: Count = 0
    """Number of constant experts of the group (MoE++). On the token's rank, each mixes a learned vector with the token's
    input."""
    top_k: PositiveInt
    """Number of experts that a token chooses from its group, null experts included (k). With router.kind=expert_choice and
    without router.capacity: mean number of experts that choose a token."""
    ffn_dim: Width
    """Hidden width of each expert's SwiGLU (F). With model.moe.experts.kind=lora: hidden width of the frozen FFN."""
    modalities: tuple[Name, ...] = ()
    """Modalities whose tokens are routed to this group. If empty, the modality that has the group's name."""

    @property
    def num_zero_computation(self) -> int:
        """Number of identity and constant experts."""
        return self.num_identity + self.num_constant

    def violations(self) -> Iterator[Violation]:
        free = self.num_zero_computation
        if self.top_k > self.num_experts + self.num_null + free:
            problem = (
                f"top_k={self.top_k} is larger than the group's {self.num_experts} true + {self.num_null} null"
                f"{f' + {free} free' if free else ''} choices; lower top_k, or raise num_experts or num_null"
            )
            yield Violation(("top_k", "num_experts", "num_null", "num_identity", "num_constant"), problem)


class CapacitySection(Section):
    """Bound on the number of (token, expert) pairs of each expert in training. Pairs beyond the bound are dropped."""

    factor: PositiveFloat
    """An expert computes at most ceil(factor x k x T / columns) pairs of its group's T tokens. 1: the number under even
    loads."""
    drop: Literal["probability", "position"] = "probability"
    """Pairs that are dropped first. probability: the pairs with the lowest probability; of equal pairs, the later token's.
    position: the pairs of the last tokens."""
    scope: Literal["rank"] = "rank"
    """Ranks whose tokens compete for an expert's capacity: rank means the micro-batch of one rank."""


class MoESection(Section):
    """The expert groups, their router, and the choice of the layers that have experts."""

    groups: dict[GroupName, GroupSection] = Field(min_length=1, description="Groups of experts by name.")
    experts: AnyExperts = Field(default_factory=FFNExpertsSection)
    """Kind of the true experts, such as FFNs, or LoRA adapters over a frozen FFN."""
    router: AnyRouter = Field(
        default_factory=TopKRouterSection, description="Router: the rule by which tokens choose experts."
    )
    capacity: CapacitySection | None = None
    """Bound on the number of (token, expert) pairs of each expert in training. null: no bound."""
    balance: tuple[AnyController, ...] = ()
    """Controllers that change the router's selection bias, at most one of each kind. Their changes are added up."""
    every: PositiveInt = Field(default=1, description="Every n-th layer is an MoE layer; the others are dense.")
    first: Count = Field(default=0, description="Index of the first MoE layer.")
    layers: tuple[Count, ...] | None = None
    """Indices of the MoE layers, in place of every and first. Only with engine.kind=transformers. null: every and first."""
    shared_ffn_dim: Count = 0
    """Hidden width of the shared expert, which computes every token. 0: no shared expert."""
    shared_gate: bool = False
    """Multiply the shared expert's output by a learned sigmoid gate, which is one number per token (Qwen2-MoE)."""
    shortcut: bool = False
    """Add the output of a layer's routed experts to the output of the next layer (LongCat-Flash). The next layer must be
    dense. The shared expert's output is still added in its own layer."""

    def violations(self) -> Iterator[Violation]:
        if self.shared_gate and not self.shared_ffn_dim:
            problem = "shared_gate=true needs a shared expert; set shared_ffn_dim to its width, or shared_gate=false"
            yield Violation(("shared_gate", "shared_ffn_dim"), problem)
        if self.shortcut and not self.shared_ffn_dim:
            problem = "shortcut=true needs a shared expert, whose output is not late; set shared_ffn_dim to its width"
            yield Violation(("shortcut", "shared_ffn_dim"), problem)
        if self.shortcut and self.experts.over_frozen_ffn:
            problem = f"shortcut=true: experts.kind={self.experts.kind} have no output of their own; set shortcut=false"
            yield Violation(("shortcut", "experts.kind"), problem)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from modality_violations(self.groups, "model.moe.groups")
        kinds, key = [section.kind for section in self.balance], "model.moe.balance"
        for kind in dict.fromkeys(kinds):
            if (count := kinds.count(kind)) > 1:
                problem = f"{key}: {count} controllers of kind {kind}; keep one, its target may name several groups"
                yield Violation((key,), problem)
        if self.balance and not self.router.has_selection_bias:
            problem = (
                f"{key}: controllers change the selection bias, which model.moe.router does not have; set "
                "model.moe.router.selection_bias=true (kind top_k or group_limited), or remove the controllers"
            )
            yield Violation((key, "model.moe.router"), problem)

    @property
    def active_targets(self) -> dict[str, float]:
        """Maps expert groups to the mean number of true experts per token at which controllers aim."""
        return {name: target for each in self.balance for name, target in each.targets.items()}

    @property
    def most_columns(self) -> int:
        """Largest number of router columns that a token chooses. A trace has this many ids for each token and layer."""
        return max(self.router.most_columns(group) for group in self.groups.values())


def modality_violations(groups: Mapping[str, GroupSection], key: str) -> Iterator[Violation]:
    """Yields a violation for each modality that is in several expert groups. `key` is the dotted key of the groups."""
    owners: dict[str, list[str]] = {}
    for name, group in groups.items():
        for modality in group.modalities or (name,):
            owners.setdefault(modality, []).append(name)
    for modality, names in owners.items():
        if len(names) > 1:
            problem = f"modality {modality!r} is routed to {' and '.join(names)}; leave it to one of them"
            yield Violation(tuple(f"{key}.{name}.modalities" for name in names), f"{key}: {problem}")


class MixtureOfDepthsSection(Section):
    """Mixture of depths: some layers compute only a fraction of the tokens. The other tokens skip the layer."""

    every: PositiveInt = Field(default=2, description="Every n-th layer is a mixture-of-depths layer.")
    first: Count = Field(default=0, description="Index of the first mixture-of-depths layer.")
    capacity: Share = 0.25
    """Fraction of the tokens in each `scope` that a mixture-of-depths layer computes (c). MoMa uses 0.25."""
    scope: Literal["rank", "ep_group", "world"] = "rank"
    """Ranks whose tokens compete for a layer: the micro-batch of one rank, of an EP group, or of all ranks. ep_group and
    world exchange one score per token in each mixture-of-depths layer."""
    causal: Literal["threshold", "auxiliary"] = "auxiliary"
    """Rule by which evaluation and generation select tokens without using later tokens. threshold: a layer computes the
    tokens whose score is above a running mean of the lowest score selected in training. auxiliary: an auxiliary router,
    which is trained with the model, selects the tokens."""
    threshold_decay: Decay = 0.99
    """Decay per step of the running mean for causal=threshold. The mean covers about 1 / (1 - decay) steps."""


class ModelSection(Section):
    """Sizes and kinds of the transformer's parts. With engine.kind=transformers, sizes follow from folder or family."""

    folder: PathText | None = None
    """Hugging Face folder of the model to train. Only with engine.kind=transformers. null: initial weights are random."""
    family: Name | None = None
    """Model type (model_type of transformers). Only with engine.kind=transformers. null: the type in the folder's
    config.json."""
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields of the family's configuration. Other fields have the family's defaults. Only with engine.kind=transformers."""
    lora: HostedLoRASection | None = None
    """LoRA adapters on a model of transformers, trained by train.only=adapters. Only with engine.kind=transformers."""
    hidden_dim: Width = Field(description="Width of the residual stream (D).")
    num_layers: Layers = Field(description="Number of transformer layers.")
    num_heads: Width = Field(description="Number of query heads.")
    num_kv_heads: Width = Field(description="Key-value heads. Fewer than num_heads: grouped-query attention.")
    head_dim: Width | None = Field(default=None, description="Width of a head. null: hidden_dim / num_heads.")
    attention: AnyAttention = Field(default_factory=GroupedQuerySection, description="Kind of attention of every layer.")
    vocab_size: Width = Field(description="Rows of the embedding: text tokens and image codes together.")
    max_seq_len: Width = Field(description="Largest number of tokens of a sequence.")
    dense_ffn_dim: Width | None = Field(default=None, description="Hidden width of the FFN in layers without experts.")
    rope_base: PositiveFloat = Field(default=10000.0, description="Base of the rotary position embedding (RoPE).")
    rope_scaling: AnyRopeScaling | None = None
    """Change of RoPE's frequencies for sequences that are longer than in pretraining. null: no change."""
    rope_dim: PositiveInt | None = None
    """Number of values per head that RoPE rotates. These are the head's first values, or its last values with
    attention.kind=latent. null: all values."""
    rope_pairs: Literal["halves", "adjacent"] = "halves"
    """Values of a head that RoPE rotates as a pair. halves: i and i + rope_dim / 2 (Llama). adjacent: 2 i and 2 i + 1
    (Ernie 4.5)."""
    sliding_window: PositiveInt | None = None
    """Number of tokens to which a token attends in a layer with a sliding window, itself included. null: no window."""
    sliding_layers: tuple[Count, ...] | None = None
    """Indices of the layers with the sliding window. null: all layers."""
    norm_eps: PositiveFloat = Field(default=1e-5, description="Epsilon of RMSNorm.")
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys. head: normalises each head (Qwen3). full: normalises the whole projection (OLMoE)."""
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    """Attention projections that have a bias. qkv: queries, keys and values (Qwen2). qkvo: also the output."""
    tie_embeddings: bool = Field(default=False, description="Use the embedding as output projection.")
    init_std: PositiveFloat = Field(default=0.02, description="Standard deviation of the initial weights.")
    moe: MoESection
    attention_lora: AttentionLoRASection | None = None
    """LoRA adapters on the attention, trained by train.only=adapters. null: no such adapters."""
    mixture_of_depths: MixtureOfDepthsSection | None = None
    """Mixture of depths: some layers compute only a fraction of the tokens. null: every layer computes all tokens."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if config.engine.hosts:
            return
        found = {"folder": self.folder, "family": self.family, "lora": self.lora and self.lora.model_dump()}
        for key, value in (*found.items(), ("moe.layers", self.moe.layers)):
            if value is not None:
                problem = (
                    f"model.{key}={value!r}: only engine.kind=transformers trains a model of transformers; set the engine, "
                    "or remove the key (`moe-dist import-hf` converts a folder for this project's own model)"
                )
                yield Violation((f"model.{key}", "engine.kind"), problem)

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Number of tokens in each layer's sliding window; None for a layer that attends to the whole document."""
        sliding = range(self.num_layers) if self.sliding_layers is None else self.sliding_layers
        return tuple(self.sliding_window if layer in sliding else None for layer in range(self.num_layers))

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        if self.moe.layers is not None:
            return self.moe.layers
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
        """Maps each attention projection to its number of inputs and its number of outputs."""
        return self.attention.widths(self)

    @property
    def has_adapters(self) -> bool:
        """Whether the model has adapters on a frozen base: LoRA experts, or LoRA on other weights."""
        experts, others = self.moe.experts, (self.attention_lora, self.lora)
        return experts.over_frozen_ffn or experts.adapts_ffns or others != (None, None)

    @property
    def adapts_folder(self) -> bool:
        """Whether the model has adapters on the frozen weights of `folder`."""
        return self.folder is not None and self.has_adapters

    @property
    def freezes_routers(self) -> bool:
        """Whether the model has adapters that are trained without the routers."""
        experts = self.moe.experts
        return experts.adapts_ffns or (self.lora is not None and not experts.over_frozen_ffn)

    @property
    def no_task_gradient(self) -> bool:
        """True if cross entropy gives routers no gradient, because each token chooses one expert, whose weight is
        normalised to 1. For a transformers family only `HostedModel.no_task_gradient` knows this."""
        moe = self.moe
        return not self.family and moe.router.normalises_chosen and all(each.top_k == 1 for each in moe.groups.values())

    @property
    def largest_dropout(self) -> float:
        """Largest dropout probability of all adapters; 0 without adapters."""
        return max(self.moe.experts.input_dropout, self.attention_lora.dropout if self.attention_lora else 0.0)

    def violations(self) -> Iterator[Violation]:
        experts = sum(group.num_experts + group.num_null + group.num_zero_computation for group in self.moe.groups.values())
        if (layers := len(self.moe_layers)) * experts > MAX_EXPERTS:
            problem = (
                f"num_layers={self.num_layers}: {layers:,} MoE layers of {experts:,} experts are more than {MAX_EXPERTS:,} "
                "experts; lower num_layers, or the experts of moe.groups"
            )
            yield Violation(("num_layers", "moe.groups", "moe.every", "moe.first"), problem)
            return  # with so many experts, the rules below would take hours
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            problem = f"num_heads={heads} must be a multiple of num_kv_heads={kv_heads}"
            yield Violation(("num_heads", "num_kv_heads"), problem)
        head_keys = ("hidden_dim", "num_heads", "head_dim")
        name, rotated = ("rope_dim", self.rope_dim) if self.rope_dim else ("head_dim", self.resolved_head_dim)
        if self.head_dim is None and self.hidden_dim % heads:
            problem = f"hidden_dim={self.hidden_dim} must be a multiple of num_heads={heads}; or set head_dim"
            yield Violation(head_keys, problem)
        elif self.resolved_head_dim % 2:
            yield Violation(
                head_keys,
                f"head_dim={self.resolved_head_dim} must be even, because RoPE rotates pairs of values; change it",
            )
        elif self.rope_dim is not None and (self.rope_dim % 2 or self.rope_dim > self.resolved_head_dim):
            problem = (
                f"rope_dim={self.rope_dim} must be even and at most head_dim={self.resolved_head_dim}; change it, or set "
                "null to rotate whole heads"
            )
            yield Violation(("rope_dim", *head_keys), problem)
        elif self.rope_scaling is not None and rotated < self.rope_scaling.least_head_dim:
            problem = (
                f"{name}={rotated} must be at least {self.rope_scaling.least_head_dim} with "
                f"rope_scaling.kind={self.rope_scaling.kind}; raise it, or choose another kind"
            )
            yield Violation((name, *head_keys, "rope_scaling.kind"), problem)
        yield from self.attention.violations_of(self)
        if self.sliding_layers == ():
            problem = "sliding_layers=[] names no layer; name some, or set sliding_window=null and sliding_layers=null"
            yield Violation(("sliding_layers",), problem)
        if self.sliding_layers and self.sliding_window is None:
            problem = f"sliding_layers={list(self.sliding_layers)} needs sliding_window; set it, or sliding_layers=null"
            yield Violation(("sliding_layers", "sliding_window"), problem)
        if beyond := [layer for layer in self.sliding_layers or () if layer >= self.num_layers]:
            problem = f"sliding_layers={beyond}: must be below num_layers={self.num_layers}; remove them"
            yield Violation(("sliding_layers", "num_layers"), problem)
        if not self.moe_layers:
            problem = f"moe.first={self.moe.first} leaves no MoE layer among num_layers={self.num_layers}"
            yield Violation(("moe.first", "num_layers"), problem)
        elif len(self.moe_layers) < self.num_layers and self.dense_ffn_dim is None:
            problem = "dense_ffn_dim is needed: some layers hold no experts (moe.every, moe.first)"
            yield Violation(("dense_ffn_dim", "moe.every", "moe.first", "num_layers"), problem)
        if self.moe.shortcut and (self.moe.every < 2 or self.moe_layers[-1:] == (self.num_layers - 1,)):
            problem = (
                f"moe.shortcut=true: a dense layer must follow each MoE layer (moe.first={self.moe.first}, moe.every="
                f"{self.moe.every}, num_layers={self.num_layers}); set moe.every to 2 or more, and num_layers so that the "
                "last layer is dense"
            )
            yield Violation(("moe.shortcut", "moe.every", "moe.first", "num_layers"), problem)
        if self.moe.shortcut and self.mixture_of_depths is not None:
            problem = "moe.shortcut=true: the next layer must compute all tokens; set mixture_of_depths to null"
            yield Violation(("moe.shortcut", "mixture_of_depths"), problem)
        dense = sorted(set(self.depth_layers) - set(self.moe_layers))
        if self.mixture_of_depths is not None and not self.depth_layers:
            problem = (
                f"mixture_of_depths.first={self.mixture_of_depths.first} leaves no mixture-of-depths layer among "
                f"num_layers={self.num_layers}; lower it, or set mixture_of_depths to null"
            )
            yield Violation(("mixture_of_depths.first", "num_layers"), problem)
        elif dense:
            problem = (
                f"mixture_of_depths: layer {dense[0]} is a mixture-of-depths layer without experts (moe.first="
                f"{self.moe.first}, moe.every={self.moe.every}); set mixture_of_depths.first={self.moe.first} and "
                "mixture_of_depths.every to a multiple of moe.every"
            )
            yield Violation(("mixture_of_depths.first", "mixture_of_depths.every", "moe.first", "moe.every"), problem)
