"""The schema of a run: frozen, strict, and complete. Every key has a type, a default where one is sensible, and a meaning.

What ran is what is written: the resolved configuration is saved beside each run. Relations between sections (experts and
ranks, vocabulary and data) are checked by `moe_dist.preflight`, which sees all of them at once; here each section only
checks itself.
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
# Placements and layers are written out one by one: what nobody has must not fill the memory.
Experts = Annotated[int, Field(ge=1, le=1 << 20)]
NullExperts = Annotated[int, Field(ge=0, le=1 << 20)]
Ranks = Annotated[int, Field(ge=1, le=1 << 20)]
Layers = Annotated[int, Field(ge=1, le=1 << 20)]
# No separators, quotes or leading dash: the name becomes a folder, a job name and part of shell lines.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
# A group's name is part of its parameters' names, so it has no dot, and is none that a torch module uses itself
# (smart_apply is what transformers adds to it).
GROUP_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,31}$"
# fmt: off
RESERVED_GROUP_NAMES = frozenset((
    "T_destination", "add_module", "apply", "bfloat16", "buffers", "call_super_init", "capacity", "children",
    "choices_E", "columns_E", "compile", "cpu", "cuda", "double", "dump_patches", "eval", "extra_repr",
    "first_free", "float", "forward", "group_of_column_C", "group_of_expert_E", "groups", "half", "ipu",
    "load_state_dict", "local", "modules", "mtia", "named_buffers", "named_children", "named_modules",
    "named_parameters", "normalise", "null_logit", "num_choices", "num_experts", "num_free", "num_identity", "pair_budget",
    "parameters", "recompute", "requires_grad_", "reset_buffers", "scale", "selection_bias", "share_memory",
    "smart_apply", "state_dict", "to", "to_empty", "top_k_G", "train", "training", "type", "with_constants", "xpu",
    "zero_grad",
    "fraction_G", "load_G", "place", "seed", "whole_G",
))
# fmt: on
UNIX_GROUP_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
PATH_PATTERN = r"^[^\x00-\x1f\x7f-\x9f]+$"
# A label of a node, as Ray has them: `modality`, `ray.io/accelerator-type`.
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
GroupName = Annotated[str, Field(pattern=GROUP_PATTERN)]
PathText = Annotated[str, Field(pattern=PATH_PATTERN)]
Label = Annotated[str, Field(pattern=LABEL_PATTERN)]

WATCHDOG_SHARE = 0.8  # of the process groups' timeout: the rest is for the ranks' reports

RELATIONS_LATER = "relations_later"  # in the validation context: keep quiet about broken relations, somebody asks for them


class Relation(NamedTuple):
    """A rule between keys that does not hold: the keys (dotted, from the section that states it) and the fault in words."""

    keys: tuple[str, ...]
    fault: str


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    def broken_relations(self) -> list[Relation]:
        """Rules between this section's keys that do not hold."""
        return []

    @model_validator(mode="after")
    def _relations_hold(self, info: ValidationInfo) -> "Section":
        if not (info.context or {}).get(RELATIONS_LATER) and (broken := self.broken_relations()):
            raise ValueError("; ".join(relation.fault for relation in broken))
        return self


class RunSection(Section):
    """Name, place and seed of the run."""

    name: Name = Field(description="Name of the run; its folder is <root>/<name>. Letters, digits, '.', '_' and '-'.")
    root: PathText = Field(default="runs", description="Folder that holds all runs.")
    seed: Count = Field(default=0, description="Seed of initial weights, data order and every other random draw.")
    group: Annotated[str, Field(pattern=UNIX_GROUP_PATTERN)] | None = Field(
        default=None,
        description="Unix group that is given the run folder, and by its setgid bit all that is made in it; null leaves "
        "both as the system makes them. What its members may do is the umask's to say.",
    )
    init_from: PathText | None = Field(
        default=None,
        description="Checkpoint (or run folder) whose weights a new run begins with, as far as names and shapes fit; a run "
        "that goes on does not look at it.",
    )
    init_rules: tuple[Literal["copy_nulls", "upcycle"], ...] = Field(
        default=(),
        description="What else is made of the weights of init_from: copy_nulls gives each null expert the router row of a "
        "true one, so that a trained top-k model begins as it is (AdaMoE); upcycle copies a dense FFN, or a group's one "
        "expert, into every expert of the group.",
    )
    keep_position: bool = Field(
        default=False,
        description="With init_from, go on in the data where that checkpoint stands instead of at its beginning; needs the "
        "same data, data section and seed. Steps and learning rate begin anew.",
    )

    def broken_relations(self) -> list[Relation]:
        if self.init_from is not None or not self.keep_position:
            return []
        fault = (
            "keep_position=true: there is no init_from whose position could be kept; name a checkpoint in init_from, or "
            "set keep_position to false"
        )
        return [Relation(("keep_position", "init_from"), fault)]


class GroupSection(Section):
    """One group of experts: a token is routed inside the group of its modality."""

    num_experts: Experts = Field(description="True experts of the group (n).")
    num_null: NullExperts = Field(
        default=0, description="Null experts of the group (m): choices that cost nothing. 0 is plain top-k."
    )
    num_identity: Count = Field(
        default=0, description="Identity experts: they add the token's normed input times its weight, on its own rank."
    )
    num_constant: Count = Field(
        default=0, description="Constant experts (MoE++): a learned vector mixed with the input, on the token's own rank."
    )
    top_k: PositiveInt = Field(
        description="Choices a token makes among all experts of its group, null ones included (k). With "
        "router.kind=expert_choice the number of experts that take a token on average, unless router.capacity says so."
    )
    ffn_dim: PositiveInt = Field(description="Hidden width of each expert's SwiGLU (F).")
    modalities: tuple[Name, ...] = Field(
        default=(), description="Modalities routed to this group; empty means the one that has the group's name."
    )

    def broken_relations(self) -> list[Relation]:
        free = self.num_identity + self.num_constant
        if self.top_k <= self.num_experts + self.num_null + free:
            return []
        fault = (
            f"top_k={self.top_k} is larger than the group's {self.num_experts} true + {self.num_null} null"
            f"{f' + {free} free' if free else ''} choices; lower top_k, or raise num_experts or num_null"
        )
        return [Relation(("top_k", "num_experts", "num_null", "num_identity", "num_constant"), fault)]


class TopKRouterSection(Section):
    """Top-k over true, null and free experts (AdaMoE); plain top-k where a group has true ones alone."""

    kind: Literal["top_k"] = Field(
        default="top_k",
        description="Top-k over true and null experts (AdaMoE); plain top-k where a group has no null experts.",
    )
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = Field(
        default="true_chosen",
        description="Routing weights are a softmax over the chosen experts that are not null (AdaMoE), over all chosen "
        "experts, over all experts that are not null, chosen or not, or the plain softmax over the whole group.",
    )
    scale: PositiveFloat = Field(default=1.0, description="Factor on every routing weight.")
    null_logit: Literal["each", "single"] = Field(
        default="each",
        description="Null experts have a router row each, or a single one whose logit stands in all of them.",
    )
    selection_bias: bool = Field(
        default=False,
        description="Choose by softmax + bias; the bias starts at 0 and enters no weight (LongCat-Flash, Ernie 4.5).",
    )


class ExpertChoiceRouterSection(Section):
    """Experts choose their tokens in training (MoMa); in evaluation each token is routed by itself."""

    kind: Literal["expert_choice"] = Field(
        default="expert_choice",
        description="Experts choose their tokens in training (MoMa); in evaluation each token is routed by itself.",
    )
    capacity: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="Share of its group's tokens in the choice set that each expert takes (c); null is top_k / num_experts "
        "of the group, so that a token is taken by top_k experts on average.",
    )
    set: Literal["rank", "ep_group", "world"] = Field(
        default="rank",
        description="Tokens among which an expert chooses: those of one rank's micro-batch, of an EP group's, or of all "
        "ranks'. The latter two exchange the router's logits in each layer.",
    )
    noise: NonNegative = Field(
        default=0.0,
        description="Scale of Gumbel-sigmoid noise on the logits in training, sigmoid(x + noise (G' - G'')); MoMa takes 1 "
        "after upcycling.",
    )
    causal: Literal["threshold", "auxiliary"] | None = Field(
        default=None,
        description="How evaluation routes a token without looking at later ones: by thresholds that follow the k-th "
        "largest score, or by auxiliary routers, trained in a second stage (train.only). Evaluation needs one of them.",
    )
    threshold_decay: Decay = Field(
        default=0.99, description="Decay a step of the running means behind the thresholds; their memory is 1 / (1 - it)."
    )


# The router's kind is filled in before it is validated, and what is read by then is Python: a list, never a tuple.
LayerLoads = Annotated[tuple[NonNegative, ...], Field(strict=False)]


class FixedLoadRouterSection(Section):
    """Top-k with the number of experts fixed in each layer, or drawn at random: what null experts are compared with."""

    kind: Literal["fixed_load"] = Field(
        default="fixed_load",
        description="Top-k with the number of experts fixed in each layer, or drawn at random: what null experts are "
        "compared with.",
    )
    loads: dict[GroupName, LayerLoads] = Field(
        min_length=1,
        description="By group, true experts a token in each MoE layer, at most the group's top_k: its floor for every "
        "token, the best ones, and one more for a random part of them. Whole numbers are a k by layer.",
    )
    normalise: Literal["true_chosen", "none"] = Field(
        default="true_chosen", description="As in router.kind=top_k: a softmax over the chosen experts, or over the group."
    )
    scale: PositiveFloat = Field(default=1.0, description="Factor on every routing weight.")


RouterSection = Annotated[
    TopKRouterSection | ExpertChoiceRouterSection | FixedLoadRouterSection, Field(discriminator="kind")
]


class CapacitySection(Section):
    """A bound of the (token, expert) pairs that an expert takes while training; what lies beyond it is dropped."""

    factor: PositiveFloat = Field(
        description="An expert takes ceil(factor x k x T / columns) pairs of its group's T tokens; 1 is the even share."
    )
    drop: Literal["probability", "position"] = Field(
        default="probability",
        description="Pairs of least probability go first, or those of the last tokens; ties stay with the earlier token.",
    )
    set: Literal["rank"] = Field(
        default="rank", description="Tokens that compete for an expert's room: those of one rank's micro-batch."
    )


class LoadTargetSection(Section):
    """Hold the mean number of true experts a token takes at a target, by the bias (LongCat-Flash)."""

    kind: Literal["load_target"] = Field(
        default="load_target",
        description="Hold the mean number of true experts a token takes at a target, by the bias (LongCat-Flash).",
    )
    target: dict[GroupName, PositiveFloat] = Field(
        min_length=1, description="True experts a token, by group; groups that are not named are left alone."
    )
    rate: PositiveFloat = Field(
        description="Of the first step: a bias moves by rate x (target - load) / (k x n), a part of a probability."
    )
    decay_steps: PositiveInt | None = Field(
        default=None, description="Steps after which the rate is half, as rate / (1 + step / decay_steps); null keeps it."
    )
    per: Literal["group", "expert"] = Field(
        default="group",
        description="The true experts of a group move together, or each by its own load, which evens them out as well.",
    )


class LossFreeSection(Section):
    """Balance a group's true experts by the sign of each one's distance from the mean load (DeepSeek-V3)."""

    kind: Literal["loss_free"] = Field(
        default="loss_free",
        description="Balance a group's true experts by the sign of each one's distance from the mean load (DeepSeek-V3).",
    )
    rate: PositiveFloat = Field(default=1e-3, description="By how much a bias moves in a step.")


ControllerSection = Annotated[LoadTargetSection | LossFreeSection, Field(discriminator="kind")]


class MoESection(Section):
    """Expert groups, their router, and which layers hold them."""

    groups: dict[GroupName, GroupSection] = Field(min_length=1, description="Groups of experts by name.")
    router: RouterSection = Field(default_factory=TopKRouterSection, description="How tokens choose experts.")
    capacity: CapacitySection | None = Field(
        default=None, description="Bound of the pairs an expert takes while training; null for none."
    )
    balance: tuple[ControllerSection, ...] = Field(
        default=(), description="Controllers of the router's selection bias, one of a kind; what they say is added up."
    )
    every: PositiveInt = Field(default=1, description="Every how many layers a layer is MoE; the others are dense.")
    first: Count = Field(default=0, description="Index of the first MoE layer.")
    shared_ffn_dim: Count = Field(
        default=0, description="Hidden width of a shared expert that sees every token; 0 for none."
    )
    shared_gate: bool = Field(
        default=False, description="Multiply the shared expert by a sigmoid of one number a token (Qwen2-MoE)."
    )

    def broken_relations(self) -> list[Relation]:
        if not self.shared_gate or self.shared_ffn_dim:
            return []
        fault = "shared_gate=true needs a shared expert; set shared_ffn_dim to its width, or shared_gate=false"
        return [Relation(("shared_gate", "shared_ffn_dim"), fault)]

    @field_validator("router", mode="before")
    @classmethod
    def _top_k_unless_said(cls, value: Any) -> Any:
        """`router: {normalise: none}` means the default kind, which has that key."""
        return {"kind": "top_k", **value} if isinstance(value, dict) and "kind" not in value else value


class DepthsSection(Section):
    """Mixture of depths: some layers compute a share of the tokens alone, and the others pass them by the residual."""

    every: PositiveInt = Field(default=2, description="Every how many layers a layer chooses its tokens.")
    first: Count = Field(default=0, description="Index of the first layer that does.")
    capacity: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.25, description="Share of the choice set's tokens that such a layer computes (c); MoMa takes 0.25."
    )
    set: Literal["rank", "ep_group", "world"] = Field(
        default="rank",
        description="Tokens among which a layer chooses: those of one rank's micro-batch, of an EP group's, or of all "
        "ranks'. The latter two exchange a score for each token in each such layer.",
    )
    causal: Literal["threshold", "auxiliary"] = Field(
        default="auxiliary",
        description="How evaluation and generation judge a token without looking at later ones: by a threshold that "
        "follows the score of the last token taken, or by an auxiliary router, trained beside the model.",
    )
    threshold_decay: Decay = Field(
        default=0.99, description="Decay a step of the running mean behind the threshold; its memory is 1 / (1 - it)."
    )


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
    qk_norm: Literal["none", "head", "full"] = Field(
        default="none",
        description="RMSNorm on queries and keys: over each head (Qwen3) or over the whole projection (OLMoE).",
    )
    attention_bias: Literal["none", "qkv", "qkvo"] = Field(
        default="none",
        description="Biases of the attention's projections: none; of queries, keys and values (Qwen2); of the output too.",
    )
    tie_embeddings: bool = Field(default=False, description="Use the embedding as output projection.")
    init_std: PositiveFloat = Field(default=0.02, description="Standard deviation of the initial weights.")
    moe: MoESection
    depths: DepthsSection | None = Field(
        default=None, description="Layers that compute a share of the tokens alone (mixture of depths); null for none."
    )

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.hidden_dim // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts."""
        return tuple(range(self.moe.first, self.num_layers, self.moe.every))

    @property
    def depth_layers(self) -> tuple[int, ...]:
        """Indices of the layers that choose their tokens."""
        return () if self.depths is None else tuple(range(self.depths.first, self.num_layers, self.depths.every))

    def broken_relations(self) -> list[Relation]:
        heads, kv_heads, broken = self.num_heads, self.num_kv_heads, []
        if heads % kv_heads:
            fault = f"num_heads={heads} must be a multiple of num_kv_heads={kv_heads}"
            broken.append(Relation(("num_heads", "num_kv_heads"), fault))
        head_keys = ("hidden_dim", "num_heads", "head_dim")
        if self.head_dim is None and self.hidden_dim % heads:
            fault = f"hidden_dim={self.hidden_dim} must be a multiple of num_heads={heads}; or set head_dim"
            broken.append(Relation(head_keys, fault))
        elif self.resolved_head_dim % 2:
            fault = f"head_dim={self.resolved_head_dim} must be even: rotary positions turn pairs"
            broken.append(Relation(head_keys, fault))
        if not self.moe_layers:
            fault = f"moe.first={self.moe.first} leaves no MoE layer among num_layers={self.num_layers}"
            broken.append(Relation(("moe.first", "num_layers"), fault))
        elif len(self.moe_layers) < self.num_layers and self.dense_ffn_dim is None:
            fault = "dense_ffn_dim is needed: some layers hold no experts (moe.every, moe.first)"
            broken.append(Relation(("dense_ffn_dim", "moe.every", "moe.first", "num_layers"), fault))
        return [*broken, *self._depth_relations()]

    def _depth_relations(self) -> list[Relation]:
        if self.depths is None:
            return []
        if not self.depth_layers:
            fault = f"depths.first={self.depths.first} leaves no layer that chooses among num_layers={self.num_layers}"
            return [Relation(("depths.first", "num_layers"), f"{fault}; lower it, or set depths to null")]
        dense = sorted(set(self.depth_layers) - set(self.moe_layers))
        if not dense:
            return []
        fault = (
            f"depths: layer {dense[0]} would choose its tokens and holds no experts (moe.first={self.moe.first}, "
            f"moe.every={self.moe.every}); set depths.first={self.moe.first} and depths.every to a multiple of moe.every"
        )
        return [Relation(("depths.first", "depths.every", "moe.first", "moe.every"), fault)]


class DataSection(Section):
    """Which prepared data set, and how it becomes sequences."""

    path: PathText = Field(description="Folder of a prepared data set: manifest.json with .bin/.idx beside it.")
    seq_len: PositiveInt = Field(description="Tokens of a packed training sequence.")
    weights: dict[Name, PositiveFloat] = Field(
        default_factory=dict,
        description="Share of sequences from each source of the manifest; empty means in proportion to their tokens.",
    )
    pack_window: PositiveInt = Field(default=512, description="Documents among which the packer looks for a best fit.")


class PerRankDispatchSection(Section):
    """One row for each (token, destination rank), whatever the number of experts it takes there."""

    kind: Literal["per_rank"] = Field(
        default="per_rank",
        description="One row for each (token, destination rank), whatever the number of experts it takes there.",
    )
    overlap: bool = Field(
        default=False,
        description="Compute own rows and the shared expert while remote rows are in flight, in backward too. It doubles "
        "the number of expert GEMMs.",
    )
    chunks: PositiveInt = Field(
        default=1,
        description="Ranges of tokens that a layer runs in: one is dispatched while the one before it is computed.",
    )


class PerNodeDispatchSection(Section):
    """One row for each (token, destination node) between nodes, then one for each (token, rank) inside the node."""

    kind: Literal["per_node"] = Field(
        default="per_node",
        description="One row for each (token, destination node) between nodes, then one for each (token, rank) inside it.",
    )
    ranks_per_node: PositiveInt = Field(description="Neighbouring ranks that make a node; divides parallel.ep.")


class PerPairDispatchSection(Section):
    """One row for each (token, expert), without a host sync; for routers whose counts are known beforehand."""

    kind: Literal["per_pair"] = Field(
        default="per_pair",
        description="One row for each (token, expert), without a host sync; for routers whose counts are known beforehand.",
    )


class DeepEPDispatchSection(Section):
    """DeepEP's kernels, where deep_ep is installed."""

    kind: Literal["deep_ep"] = Field(default="deep_ep", description="DeepEP's kernels, where deep_ep is installed.")


class HybridEPDispatchSection(Section):
    """HybridEP's kernels, where deep_ep is installed from its branch hybrid-ep."""

    kind: Literal["hybrid_ep"] = Field(
        default="hybrid_ep", description="HybridEP's kernels, where deep_ep is installed from its branch hybrid-ep."
    )


DispatchSection = Annotated[
    PerRankDispatchSection
    | PerNodeDispatchSection
    | PerPairDispatchSection
    | DeepEPDispatchSection
    | HybridEPDispatchSection,
    Field(discriminator="kind"),
]


class ParallelSection(Section):
    """How ranks share the work, and in what precision."""

    ep: Ranks = Field(default=1, description="Ranks over which the experts are sharded (an EP group).")
    edp: Ranks = Field(default=1, description="EP groups, each with a copy of all experts. World size is ep x edp.")
    data: Literal["ddp", "fsdp2"] = Field(
        default="ddp", description="Replicate the dense parameters (ddp) or shard them (fsdp2)."
    )
    recompute: Literal["none", "experts", "block"] = Field(
        default="none",
        description="Activations computed again in backward: none; experts (the FFN between the exchanges, which repeats "
        "no exchange); block (attention and MoE layers, which repeats the dispatch exchange, never the routing).",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Compute type; master weights and sums stay fp32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes CUDA where there is one.")
    expert_pair_budget: PositiveInt | None = Field(
        default=None,
        description="(token, expert) pairs a rank's experts compute at once; beyond it they run in recomputed chunks.",
    )
    expert_gemm: Literal["auto", "grouped", "loop"] = Field(
        default="auto",
        description="The experts' products: torch's grouped GEMM or a loop over experts; auto takes grouped where "
        "it is faster: on CUDA in bf16, on CPU from 16 experts of a group on a rank; where the widths allow it.",
    )
    max_receive_rows: PositiveInt | None = Field(
        default=None,
        description="Bound of the rows a rank may receive in one layer, an error before the buffer is made; "
        "null bounds it by (ep - 1) x the micro-batch's tokens alone.",
    )
    dispatch: DispatchSection = Field(
        default_factory=PerRankDispatchSection, description="How rows travel to the ranks of their experts and back."
    )
    deterministic: bool = Field(
        default=False,
        description="Repeat a run bit for bit on the same layout: on CUDA slower kernels instead of atomic additions, and "
        "an error at an operation that has no repeatable form. The CPU repeats without it.",
    )
    timeout_seconds: PositiveFloat = Field(default=600.0, description="A collective that takes longer ends the run.")
    watchdog_seconds: PositiveFloat | None = Field(
        default=None,
        description="A collective that takes longer makes every rank write where it is, then ends the run, naming the rank "
        "that the others wait for; at most, and by default, 0.8 x timeout_seconds.",
    )
    check_exchanges: bool = Field(
        default=False,
        description="Check every row of every exchange by checksum, naming layer, ranks and row where one was damaged; for "
        "debugging, its cost is in docs/parallelism.md.",
    )

    @property
    def resolved_watchdog_seconds(self) -> float:
        return self.watchdog_seconds or WATCHDOG_SHARE * self.timeout_seconds

    def broken_relations(self) -> list[Relation]:
        if self.resolved_watchdog_seconds <= WATCHDOG_SHARE * self.timeout_seconds:
            return []
        fault = (
            f"watchdog_seconds={self.watchdog_seconds:g} must be at most {WATCHDOG_SHARE:g} x timeout_seconds="
            f"{self.timeout_seconds:g}, since the ranks need time for their reports; lower it, or raise timeout_seconds"
        )
        return [Relation(("watchdog_seconds", "timeout_seconds"), fault)]

    @field_validator("dispatch", mode="before")
    @classmethod
    def _per_rank_unless_said(cls, value: Any) -> Any:
        """`parallel.dispatch.overlap=true` alone means the default kind, which has that key."""
        return {"kind": "per_rank", **value} if isinstance(value, dict) and "kind" not in value else value


class NodeSection(Section):
    """The nodes that a group's ranks belong on."""

    feature: Name | None = Field(
        default=None,
        description="Feature of the node under Slurm (--constraint); under Ray, where labels are empty, the label "
        "`feature` with this value. null: any node.",
    )
    labels: dict[Label, Label] = Field(default_factory=dict, description="Labels of the node under Ray, name and value.")
    own: bool = Field(default=False, description="Whole nodes of the group's own: no rank of another group goes there.")


class PinnedGroupSection(Section):
    """Where one group lives."""

    ranks: tuple[Count, ...] = Field(default=(), description="Positions in the EP group that hold this group's experts.")
    node: NodeSection = Field(
        default_factory=NodeSection, description="The nodes that the group's ranks belong on; by default any."
    )


class InterleavedSection(Section):
    """Every group is spread over all ranks of an EP group."""

    policy: Literal["interleaved"] = Field(
        default="interleaved", description="Every group is spread over all ranks of an EP group."
    )


class PinnedSection(Section):
    """Each group's experts live on ranks of their own; where `ranks` is not given, the planner divides them by load."""

    policy: Literal["pinned"] = Field(
        default="pinned",
        description="Each group's experts live on ranks of their own, divided by load where `groups` does not say which.",
    )
    groups: dict[Name, PinnedGroupSection] = Field(default_factory=dict, description="Ranks of each group, by name.")


class ExplicitSection(Section):
    """The experts of each rank written out: any number a rank, none as well."""

    policy: Literal["explicit"] = Field(
        default="explicit", description="The experts of each rank written out: any number a rank, none as well."
    )
    slots: tuple[tuple[str, ...], ...] = Field(description="For each rank of an EP group its experts, as 'group/index'.")


PlacementSection = Annotated[InterleavedSection | PinnedSection | ExplicitSection, Field(discriminator="policy")]


class ConstantSchedule(Section):
    """Linear warm-up, then constant."""

    kind: Literal["constant"] = Field(default="constant", description="Linear warm-up, then constant.")
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")


class CosineSchedule(Section):
    """Linear warm-up, then half a cosine down to min_ratio at the last step."""

    kind: Literal["cosine"] = Field(
        default="cosine", description="Linear warm-up, then half a cosine down to min_ratio at the last step."
    )
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    min_ratio: Fraction = Field(default=0.1, description="Last learning rate over the peak.")


class WsdSchedule(Section):
    """Warm-up, stable, decay: constant until the last decay_steps, then linear down to min_ratio."""

    kind: Literal["wsd"] = Field(
        default="wsd",
        description="Warm-up, stable, decay: constant until the last decay_steps, then linear down to min_ratio.",
    )
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    decay_steps: PositiveInt = Field(description="Steps of the final decay.")
    min_ratio: Fraction = Field(default=0.0, description="Last learning rate over the peak.")


ScheduleSection = Annotated[ConstantSchedule | CosineSchedule | WsdSchedule, Field(discriminator="kind")]


class OptimizerSection(Section):
    """AdamW, its schedule and the bound of the gradient norm."""

    kind: Literal["adamw"] = Field(default="adamw", description="AdamW, its schedule and the bound of the gradient norm.")
    backend: Literal["auto", "torch", "apex"] = Field(
        default="auto", description="auto takes NVIDIA Apex's FusedAdam where it is installed, else torch's fused AdamW."
    )
    lr: PositiveFloat = Field(description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the moments.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    weight_decay: NonNegative = Field(
        default=0.1, description="Decoupled weight decay; norms, embeddings and routers get none."
    )
    clip_norm: PositiveFloat | None = Field(default=1.0, description="Bound of the global gradient norm; null for none.")
    schedule: ScheduleSection = Field(default_factory=lambda: ConstantSchedule(), description="Learning rate over steps.")


class BalanceSection(Section):
    """Load-balance loss."""

    kind: Literal["null_averaged", "vanilla", "null_split"] = Field(
        default="null_averaged",
        description="Null experts share one averaged load (AdaMoE), or each has its own; or nothing but the split between "
        "true experts and all others is regulated (ZEDA).",
    )
    null_weight: dict[GroupName, PositiveFloat] = Field(
        default_factory=dict,
        description="By group, the load that a null expert is to carry over that of a true one; 1 where it is not named. "
        "Even is then k n / (n + m w) true experts a token.",
    )
    schedule: tuple[tuple[Count, NonNegative], ...] = Field(
        default=((0, 0.02),), description="[first step, coefficient] pairs; each holds until the next one's first step."
    )

    def broken_relations(self) -> list[Relation]:
        starts, broken = [start for start, _ in self.schedule], []
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            broken.append(Relation(("schedule",), f"schedule must start at step 0 and rise, got first steps {starts}"))
        if self.null_weight and self.kind == "vanilla":
            fault = "null_weight: kind=vanilla gives every null expert its own load; take null_averaged or null_split"
            broken.append(Relation(("null_weight", "kind"), fault))
        return broken


class LossSection(Section):
    """Auxiliary losses beside cross entropy."""

    balance: BalanceSection = Field(default_factory=BalanceSection, description="Load-balance loss, per layer and group.")
    z: NonNegative = Field(
        default=0.0, description="Coefficient of the router z-loss (mean squared log-sum-exp of its logits)."
    )


class TrainSection(Section):
    """Steps and batches."""

    steps: PositiveInt = Field(description="Optimizer steps of the whole run.")
    global_batch: PositiveInt = Field(description="Sequences a step, over all ranks and micro-batches.")
    micro_batch: PositiveInt = Field(description="Sequences a rank computes at once.")
    max_skipped_in_a_row: PositiveInt = Field(default=10, description="Non-finite steps in a row that end the run with 70.")
    only: Literal["auxiliary_routers"] | None = Field(
        default=None,
        description="Train these parameters alone and freeze all others: auxiliary_routers is the second stage of expert "
        "choice, begun with run.init_from. null trains all.",
    )


class EvaluationSection(Section):
    """Held-out evaluation."""

    every: PositiveInt = Field(description="Steps between held-out evaluations; there is always one at the end.")
    sequences: PositiveInt = Field(default=128, description="Held-out sequences of each source in one evaluation.")
    final_sequences: PositiveInt = Field(
        default=512, description="Held-out sequences of each source in the last evaluation."
    )
    calibration: Count = Field(
        default=4,
        description="Of router.causal=threshold: before each evaluation, thresholds are set so that the last training "
        "micro-batches of each rank, so many, give each expert as many tokens as it takes of them in training; 0 leaves "
        "the running means as they are.",
    )
    balance_efficiency: bool = Field(
        default=True, description="Measure throughput with real against evenly spread routing."
    )
    ablate_experts: bool = Field(
        default=True, description="At the end, measure held-out loss with the experts' output zeroed."
    )


class CheckpointSection(Section):
    """When the state is saved, and what is kept."""

    every: PositiveInt = Field(default=500, description="Steps between checkpoints; there is always one at the end.")
    keep: PositiveInt = Field(default=2, description="Checkpoints kept; older ones are removed.")
    asynchronous: bool = Field(
        default=True,
        description="Write checkpoints while the training goes on; takes host memory for what a rank writes.",
    )


class ConsoleSink(Section):
    """Progress bar on a terminal, plain lines elsewhere."""

    kind: Literal["console"] = Field(default="console", description="Progress bar on a terminal, plain lines elsewhere.")
    every: PositiveInt = Field(default=10, description="Steps between plain lines where there is no terminal.")


class JsonlSink(Section):
    """metrics.jsonl in the run folder, one record a step."""

    kind: Literal["jsonl"] = Field(default="jsonl", description="metrics.jsonl in the run folder, one record a step.")
    arrays_every: PositiveInt = Field(
        default=1,
        description="Steps between lines with the choices of every expert; 64 layers x 128 experts take 70 KB a line.",
    )


class TensorBoardSink(Section):
    """TensorBoard event files in the run folder."""

    kind: Literal["tensorboard"] = Field(default="tensorboard", description="TensorBoard event files in the run folder.")
    pictures_every: PositiveInt = Field(default=100, description="Steps between heat maps and histograms.")


class PrometheusSink(Section):
    """A textfile for Prometheus' node exporter, replaced at each step."""

    kind: Literal["prometheus"] = Field(
        default="prometheus", description="A textfile for Prometheus' node exporter, replaced at each step."
    )
    path: PathText | None = Field(
        default=None, description="Textfile to replace at each step; default metrics.prom in the run folder."
    )


class WandbSink(Section):
    """Weights & Biases."""

    kind: Literal["wandb"] = Field(default="wandb", description="Weights & Biases.")
    project: str = Field(description="Project in wandb.")
    mode: Literal["online", "offline"] = Field(default="online", description="offline writes to the run folder only.")


SinkSection = Annotated[ConsoleSink | JsonlSink | TensorBoardSink | PrometheusSink | WandbSink, Field(discriminator="kind")]


class MonitorSection(Section):
    """What is shown, and where."""

    sinks: tuple[SinkSection, ...] = Field(
        default=(ConsoleSink(), JsonlSink(), TensorBoardSink()),
        description="Where records go; metrics.jsonl is the source of all.",
    )
    device_seconds: PositiveFloat = Field(
        default=5.0, description="Seconds between readings of GPU (NVML) and host (psutil)."
    )
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="Peak TFLOP/s of one device at the compute type, for perf/mfu; null leaves it out."
    )


class Config(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection
    loss: LossSection = Field(default_factory=LossSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    placement: PlacementSection = Field(default_factory=InterleavedSection)
    evaluation: EvaluationSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    monitor: MonitorSection = Field(default_factory=MonitorSection)


# Keys (a section, or one key of it) that may differ when a run is resumed: the model, the data and the optimisation stay.
MAY_CHANGE_ON_RESUME: tuple[str, ...] = (
    "train.steps",
    "train.micro_batch",
    "train.max_skipped_in_a_row",
    "parallel",
    "placement",
    "evaluation",
    "checkpoint",
    "monitor",
    "run.root",
    "run.group",
    "data.path",  # the same data elsewhere: what is in them is held by digests (config/data_digest.py)
)
