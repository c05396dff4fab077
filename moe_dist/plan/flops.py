"""Parameters and FLOPs of the transformer from plain sizes: the project's only such count. Imports no torch.

A multiplication and an addition are two FLOPs. Matrix products are counted; norms, softmax, SwiGLU's product and the
weighting of expert outputs are not (together below 1 %). Attention's products count all positions of the sequence, as
PaLM's model FLOPs do; kernels that skip masked positions compute less.
Shape letters: S sequence length, D hidden size, H query heads, d head width, F an FFN's hidden width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moe_dist.placement.placement import ExpertGroup

Recompute = Literal["none", "experts", "block"]


@dataclass(frozen=True)
class Adapters:
    """LoRA of rank r on some projections, by name: gate, up and down of an FFN, or q, k, v and o of the attention."""

    rank: int
    targets: tuple[str, ...]

    def numbers(self, widths: Mapping[str, tuple[int, int]]) -> int:
        """Parameters of one adapter on each target, given each target's inputs and outputs."""
        return sum(self.rank * sum(widths[target]) for target in self.targets)


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer with experts.

    Attributes:
        num_layers, num_moe_layers: Number of all layers, and of MoE layers.
        dense_ffn_dim: FFN width of the other layers.
        shared_ffn_dim: Width of the shared expert of each MoE layer; 0 for none.
        groups: Expert groups.
        auxiliary_routers: Each group has an auxiliary router of two layers, D to D / 2 to n.
        single_null_row: Whether the null experts of a group share one router row.
        num_depth_layers, depth_capacity: Number of mixture-of-depths layers, and the share of the tokens that they compute.
        depth_auxiliary: Whether each of them has an auxiliary router of two layers, D to D / 2 to 1.
        shared_gate: Whether a sigmoid of one number per token scales the shared expert.
        attention_bias: The projections of the attention that have a bias.
        lora: The true experts are these adapters, over one frozen FFN of the groups' width.
        attention_lora: Adapters on every layer's attention. With either kind, all but adapters and routers is frozen.
    """

    hidden_dim: int
    num_layers: int
    num_moe_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dense_ffn_dim: int
    shared_ffn_dim: int
    qk_norm: Literal["none", "head", "full"]
    tie_embeddings: bool
    groups: Sequence[ExpertGroup]
    auxiliary_routers: bool = False
    single_null_row: bool = False
    num_depth_layers: int = 0
    depth_capacity: float = 1.0
    depth_auxiliary: bool = False
    shared_gate: bool = False
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    lora: Adapters | None = None
    attention_lora: Adapters | None = None

    @property
    def frozen_base(self) -> bool:
        """Whether only adapters and routers are trained."""
        return self.lora is not None or self.attention_lora is not None

    @property
    def for_all_ffn_dim(self) -> int:
        """Width of the FFN in an MoE layer that computes every token: the shared expert, or the FFN under LoRA experts."""
        return self.shared_ffn_dim if self.lora is None else self.groups[0].ffn_dim

    @property
    def expert(self) -> Mapping[str, int]:
        """Parameters of one expert of each group."""
        if self.lora is None:
            return {group.name: 3 * self.hidden_dim * group.ffn_dim for group in self.groups}
        dim, ffn = self.hidden_dim, self.for_all_ffn_dim
        numbers = self.lora.numbers({"gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)})
        return {group.name: numbers for group in self.groups}

    @property
    def attention_adapters(self) -> int:
        """Parameters of the adapters of all layers' attention."""
        if self.attention_lora is None:
            return 0
        dim, heads, kv_heads = self.hidden_dim, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        widths = {"q": (dim, heads), "k": (dim, kv_heads), "v": (dim, kv_heads), "o": (heads, dim)}
        return self.num_layers * self.attention_lora.numbers(widths)

    @property
    def router_rows(self) -> int:
        """Rows of a layer's router, over all groups."""
        shared = sum(max(0, group.num_null - 1) for group in self.groups) if self.single_null_row else 0
        return sum(group.num_columns for group in self.groups) - shared

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers - self.num_moe_layers

    @property
    def layers_passed_by(self) -> float:
        """Mean number of MoE layers that a token skips by mixture of depths."""
        return self.num_depth_layers * (1.0 - self.depth_capacity)

    @property
    def depth_router(self) -> int:
        """Parameters of all mixture-of-depths routers, which every token uses."""
        auxiliary = max(1, self.hidden_dim // 2) * (self.hidden_dim + 1) if self.depth_auxiliary else 0
        return self.num_depth_layers * (self.hidden_dim + auxiliary)


@dataclass(frozen=True)
class Parts:
    """A count by part of the model, over all layers.

    Attributes:
        embedding, output: Embedding and output projection; if tied, embedding has the parameters and output the FLOPs.
        attention: Projections and their norms; FLOPs include the products over positions.
        router, experts, free, shared, dense_ffn, norms: Likewise. free is the vectors and gates of constant experts; shared
            includes the frozen FFN under LoRA experts.
        adapters: LoRA experts, and LoRA on the attention.
    """

    embedding: float = 0
    attention: float = 0
    router: float = 0
    experts: float = 0
    free: float = 0
    shared: float = 0
    dense_ffn: float = 0
    norms: float = 0
    output: float = 0
    adapters: float = 0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def expected_experts(groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """True experts per token of each group under a uniform router, k n / (n + m)."""
    return {group.name: group.expected_experts_per_token for group in groups}


def parameters(shape: Shape, *, experts_held: Mapping[str, float] | None = None) -> Parts:
    """Parameters by part; routers include the rows of zero-computation experts.

    Args:
        experts_held: Number of experts of each group to count in each layer. By default all; or those of a rank; or, for
            active parameters, those that a token takes, weighted by the groups' shares of the tokens.
    """
    s, dim = shape, shape.hidden_dim
    held = experts_held if experts_held is not None else {group.name: group.num_experts for group in s.groups}
    heads, kv_heads = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
    projections = dim * (2 * heads + 2 * kv_heads)
    auxiliary = sum(max(1, dim // 2) * (dim + g.num_experts) for g in s.groups) if s.auxiliary_routers else 0
    qk_norms = {"none": 0, "head": 2 * s.head_dim, "full": heads + kv_heads}[s.qk_norm]
    experts = s.num_moe_layers * sum(s.expert[g.name] * held[g.name] for g in s.groups)
    biases = {"none": 0, "qkv": heads + 2 * kv_heads, "qkvo": heads + 2 * kv_heads + dim}[s.attention_bias]
    return Parts(
        embedding=s.vocab_size * dim,
        attention=s.num_layers * (projections + qk_norms + biases),
        router=s.num_moe_layers * (dim * s.router_rows + auxiliary) + s.depth_router,
        experts=0 if s.lora else experts,
        free=s.num_moe_layers * 3 * dim * sum(g.num_constant for g in s.groups),
        shared=s.num_moe_layers * dim * (3 * s.for_all_ffn_dim + s.shared_gate),
        dense_ffn=s.num_dense_layers * 3 * dim * s.dense_ffn_dim,
        norms=dim * (2 * s.num_layers + 1),
        output=0 if s.tie_embeddings else s.vocab_size * dim,
        adapters=s.attention_adapters + (experts if s.lora else 0),
    )


def active_parameters(shape: Shape, *, experts_per_token: Mapping[str, float], token_share: Mapping[str, float]) -> Parts:
    """Parameters that a mean token uses: all except experts that it does not take and layers that it skips.

    Args:
        experts_per_token: Mean true experts of a token of each group.
        token_share: Share of the tokens in each group.
    """
    taken = {name: experts * token_share[name] for name, experts in experts_per_token.items()}
    met = parameters(shape, experts_held=taken)
    if not shape.num_depth_layers:
        return met
    layers = 1 - shape.layers_passed_by / shape.num_layers
    moe = 1 - shape.layers_passed_by / shape.num_moe_layers
    return replace(
        met,
        attention=layers * met.attention,
        router=moe * (met.router - shape.depth_router) + shape.depth_router,
        experts=moe * met.experts,
        free=moe * met.free,
        shared=moe * met.shared,
        norms=met.norms - 2 * shape.hidden_dim * shape.layers_passed_by,
    )


def forward_flops(
    shape: Shape, *, seq_len: int, experts_per_token: Mapping[str, float], token_share: Mapping[str, float]
) -> Parts:
    """FLOPs of a forward pass for a mean token, by part.

    A product with a weight of n entries is 2 n FLOPs; attention adds 2 H d S for the scores and as much for the values.
    Every token uses the router rows and the constant experts of all groups.

    Args:
        seq_len: S.
        experts_per_token, token_share: As `active_parameters`.
    """
    s, dim = shape, shape.hidden_dim
    weights = active_parameters(s, experts_per_token=experts_per_token, token_share=token_share)
    heads = s.num_heads * s.head_dim
    projections = dim * (2 * heads + 2 * s.num_kv_heads * s.head_dim)
    # In a mixture-of-depths layer a share c of the tokens attends, each to a share c of the positions: c^2.
    attending = s.num_layers - s.num_depth_layers * (1 - s.depth_capacity**2)
    return Parts(
        attention=(s.num_layers - s.layers_passed_by) * 2 * projections + attending * 4 * heads * seq_len,
        router=2 * weights.router,
        experts=2 * weights.experts,
        free=2 * weights.free,
        shared=2 * weights.shared,
        dense_ffn=2 * weights.dense_ffn,
        output=2 * s.vocab_size * dim,
        adapters=2 * weights.adapters,
    )


def frozen_flops(shape: Shape, forward: Parts, *, seq_len: int) -> float:
    """FLOPs of a forward pass in products with frozen weights; backward computes no gradient of these weights. 0 without
    adapters."""
    if not shape.frozen_base:
        return 0.0
    scores = shape.num_layers * 4 * shape.num_heads * shape.head_dim * seq_len
    return forward.total - forward.adapters - forward.router - scores


def untuned_flops(shape: Shape, forward: Parts, *, seq_len: int, moe_layers: Sequence[int], tuned: Sequence[int]) -> float:
    """FLOPs of forward and backward in full training that router tuning does not compute.

    Backward ends at the lowest tuned layer. Its router needs a gradient of its weights, and its experts one of their input,
    since rows and weights go through the exchanges together. Above that layer each product with a frozen weight computes
    the gradient of its input, which costs as much as forward; the attention scores, products of two activations, compute
    both gradients.

    Args:
        forward: From `forward_flops`; without mixture of depths.
        moe_layers, tuned: Indices of the MoE layers, and of those whose routers are trained.
    """
    lowest = min(tuned)
    above, moe_above = shape.num_layers - 1 - lowest, sum(layer > lowest for layer in moe_layers)
    scores = 4 * shape.num_heads * shape.head_dim * seq_len
    attention = above * (forward.attention / shape.num_layers + scores)
    router = forward.router / shape.num_moe_layers
    moe = (forward.experts + forward.free + forward.shared) / shape.num_moe_layers + router
    dense = (above - moe_above) * forward.dense_ffn / max(1, shape.num_dense_layers)
    lowest_experts = forward.experts / shape.num_moe_layers
    backward = forward.output + attention + moe_above * moe + dense + lowest_experts + len(tuned) * router
    return 2 * forward.total - backward


def model_flops_per_token(
    experts_per_token: Mapping[str, float],
    token_share: Mapping[str, float],
    *,
    shape: Shape,
    seq_len: int,
    moe_layers: Sequence[int],
    tuned: Sequence[int] | None,
) -> float:
    """FLOPs of forward and backward for a mean token of a training run, without recomputation.

    Args:
        experts_per_token, token_share: As `active_parameters`.
        moe_layers, tuned: As `untuned_flops`; tuned is None unless only routers are trained.
    """
    forward = forward_flops(shape, seq_len=seq_len, experts_per_token=experts_per_token, token_share=token_share)
    return training_flops(
        forward, frozen=flops_left_out(shape, forward, seq_len=seq_len, moe_layers=moe_layers, tuned=tuned)
    )


def flops_left_out(
    shape: Shape, forward: Parts, *, seq_len: int, moe_layers: Sequence[int], tuned: Sequence[int] | None
) -> float:
    """FLOPs of full training that a run does not compute because it trains only adapters, or only some routers."""
    if tuned is None:
        return frozen_flops(shape, forward, seq_len=seq_len)
    return untuned_flops(shape, forward, seq_len=seq_len, moe_layers=moe_layers, tuned=tuned)


def training_flops(forward: Parts, *, recompute: Recompute = "none", frozen: float = 0.0) -> float:
    """FLOPs per token of forward and backward: three times the forward pass, minus the gradients of frozen weights, plus
    recomputation. The last is an upper bound: the last product of a recomputed unit need not be repeated, and nothing has a
    gradient below the first adapter of the first layer.

    Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) excludes recomputation: use `recompute="none"`.

    Args:
        frozen: From `frozen_flops` or `untuned_flops`.
    """
    repeated = {
        "none": 0.0,
        "experts": forward.experts or forward.shared + forward.adapters,  # none: they are LoRA over the FFN in `shared`
        "block": forward.attention + forward.router + forward.experts + forward.free + forward.shared + forward.adapters,
    }[recompute]
    return 3 * forward.total - frozen + repeated
