"""Counts parameters and FLOPs of the transformer from its configuration. Imports no torch.

A multiplication and an addition are two FLOPs. Matrix products are counted. Norms, softmax, SwiGLU's product and the
weighting of expert outputs are not counted, because together they take below 1 % of the FLOPs. Attention scores are counted
for all positions of the sequence, like PaLM's model FLOPs; kernels that skip masked positions compute fewer scores. Shape
letters: S sequence length, D hidden size, H query heads, d head width, F an FFN's hidden width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan.policies import expert_groups

Recompute = Literal["none", "experts", "block"]
ROUTER_BUFFERS = ("threshold", "statistics")  # tensors of routers that are no parameters


def adapter_parameters(section: Any, widths: Mapping[str, tuple[int, int]]) -> int:
    """Returns the number of parameters of a LoRA section's adapters; 0 if `section` is None. `widths` has the numbers of
    inputs and outputs of each projection."""
    return 0 if section is None else sum(section.rank * sum(widths[target]) for target in section.targets)


def expert_parameters(model: ModelSection) -> dict[str, int]:
    """Returns, for each group, the number of parameters of one true expert."""
    dim, experts = model.hidden_dim, model.moe.experts
    if not experts.over_frozen_ffn:
        groups = model.moe.groups.items()
        return {name: 3 * dim * group.ffn_dim + experts.num_biases(dim, group.ffn_dim) for name, group in groups}
    ffn = ffn_dim_for_all(model)
    return dict.fromkeys(
        model.moe.groups, adapter_parameters(experts, {"gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)})
    )


def expert_adapters(model: ModelSection, experts: Mapping[str, float]) -> float:
    """Returns the number of parameters of the adapters on `experts` experts of each group, over all MoE layers, without the
    adapters of the shared expert. An adapter that experts share counts once for each of these experts."""
    section, dim = model.moe.experts, model.hidden_dim
    groups = model.moe.groups.items()
    return len(model.moe_layers) * sum(section.adapter_parameters(dim, g.ffn_dim) * experts[name] for name, g in groups)


def own_adapters(model: ModelSection, experts: Mapping[str, float]) -> float:
    """Returns the number of parameters in `expert_adapters` that only the ranks of the adapters' experts hold. An adapter
    that all experts share is on every rank and is left out."""
    return 0 if model.moe.experts.adapter_is_shared else expert_adapters(model, experts)


def _replicated_adapters(model: ModelSection) -> float:
    """Returns the number of parameters of adapters on attention and on the shared expert, and of adapters that experts
    share."""
    section, found = model.moe.experts, model.num_layers * adapter_parameters(model.attention_lora, model.attention_widths)
    found += expert_adapters(model, dict.fromkeys(model.moe.groups, 1)) if section.adapter_is_shared else 0
    return found + len(model.moe_layers) * 3 * section.shared_expert_rank * (model.hidden_dim + model.moe.shared_ffn_dim)


def ffn_dim_for_all(model: ModelSection) -> int:
    """Returns the width of an MoE layer's FFN for all tokens: the shared expert, or the FFN under LoRA experts."""
    moe = model.moe
    return next(iter(moe.groups.values())).ffn_dim if moe.experts.over_frozen_ffn else moe.shared_ffn_dim


def router_rows(model: ModelSection) -> int:
    """Returns the number of rows of one layer's router weights, over all groups."""
    groups = expert_groups(model.moe)
    shared = sum(max(0, group.num_null - 1) for group in groups) if model.moe.router.single_null_row else 0
    return sum(group.num_columns for group in groups) - shared


def layers_passed_by(model: ModelSection) -> float:
    """Returns the mean number of layers that a token skips because of mixture of depths."""
    depths = model.mixture_of_depths
    return 0.0 if depths is None else len(model.depth_layers) * (1.0 - depths.capacity)


def depth_router(model: ModelSection) -> int:
    """Returns the parameters of all mixture-of-depths routers; every token uses all of them."""
    depths, dim = model.mixture_of_depths, model.hidden_dim
    auxiliary = max(1, dim // 2) * (dim + 1) if depths is not None and depths.causal == "auxiliary" else 0
    return len(model.depth_layers) * (dim + auxiliary)


@dataclass(frozen=True)
class Parts:
    """Parameters or FLOPs of each part of the model, over all layers."""

    embedding: float = 0  # embedding table; if tied, it is also the output projection
    attention: float = 0  # projections with biases and norms; its FLOPs include queries x keys and scores x values
    router: float = 0
    experts: float = 0
    free: float = 0  # vectors and gates of constant experts
    shared: float = 0  # shared expert; with LoRA experts the frozen FFN
    dense_ffn: float = 0
    norms: float = 0
    output: float = 0  # output projection; if tied, it has FLOPs but no parameters of its own
    adapters: float = 0  # LoRA experts, and LoRA on attention and experts

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def expected_experts(groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """Returns the mean number of true experts of a token of each group if routing is uniform (see `ExpertGroup`)."""
    return {group.name: group.expected_experts_per_token for group in groups}


def parameters(model: ModelSection, *, experts_held: Mapping[str, float] | None = None) -> Parts:
    """Returns the number of parameters of each part of the model. The part of routers includes the rows of zero-computation
    experts. `experts_held` is the number of experts per layer to count, by group. It may be fractional; by default all
    experts count."""
    dim, moe, groups, num_moe_layers = model.hidden_dim, model.moe, expert_groups(model.moe), len(model.moe_layers)
    held = experts_held if experts_held is not None else {group.name: group.num_experts for group in groups}
    attention = sum(i * o for i, o in model.attention_widths.values()) + model.attention.num_vectors(model)
    further = [moe.router.further_tensors(group, dim).items() for group in moe.groups.values()]
    of_routers = sum(math.prod(shape) for each in further for name, shape in each if name not in ROUTER_BUFFERS)
    experts = num_moe_layers * sum(each * held[name] for name, each in expert_parameters(model).items())
    lora, biases = moe.experts.over_frozen_ffn, sum(g.num_experts for g in groups) * moe.router.has_logit_bias
    residual = max(0, num_moe_layers - 1) * sum(moe.router.further_parameters(g.num_columns) for g in groups)
    return Parts(
        embedding=model.vocab_size * dim,
        attention=model.num_layers * attention,
        router=num_moe_layers * (dim * router_rows(model) + biases + of_routers) + depth_router(model) + residual,
        experts=0 if lora else experts,
        free=num_moe_layers * 3 * dim * sum(g.num_constant for g in groups),
        shared=num_moe_layers * dim * (3 * ffn_dim_for_all(model) + moe.shared_gate),
        dense_ffn=model.num_dense_layers * 3 * dim * (model.dense_ffn_dim or 0),
        norms=dim * (2 * model.num_layers + 1),
        output=0 if model.tie_embeddings else model.vocab_size * dim,
        adapters=_replicated_adapters(model) + (experts if lora else own_adapters(model, held)),
    )


def active_parameters(
    model: ModelSection, *, experts_per_token: Mapping[str, float], token_share: Mapping[str, float]
) -> Parts:
    """Returns the mean number of parameters that a token uses, without the experts and layers that it does not use.

    Args:
        experts_per_token: Mean number of true experts that a token takes, by group.
        token_share: Share of all tokens that belong to each group.
    """
    taken = {name: experts * token_share[name] for name, experts in experts_per_token.items()}
    met, passed_by, depths = parameters(model, experts_held=taken), layers_passed_by(model), depth_router(model)
    if not model.depth_layers:
        return met
    layers, moe = 1 - passed_by / model.num_layers, 1 - passed_by / len(model.moe_layers)
    return replace(
        met,
        attention=layers * met.attention,
        router=moe * (met.router - depths) + depths,
        experts=moe * met.experts,
        free=moe * met.free,
        shared=moe * met.shared,
        norms=met.norms - 2 * model.hidden_dim * passed_by,
    )


def forward_flops(
    model: ModelSection, *, seq_len: int, experts_per_token: Mapping[str, float], token_share: Mapping[str, float]
) -> Parts:
    """Returns forward FLOPs per token in each part of the model. `active_parameters` describes `experts_per_token` and
    `token_share`.

    A product with a weight of n elements takes 2 n FLOPs per token. Attention adds 2 H d S FLOPs per token for the scores
    and 2 H d S for the values. Every token uses the router rows and the constant experts of all groups.
    """
    weights = active_parameters(model, experts_per_token=experts_per_token, token_share=token_share)
    taken = {name: experts * token_share[name] for name, experts in experts_per_token.items()}
    # A token multiplies by the shared adapter once for each expert that it takes, but `weights` counts the adapter once.
    beyond_one = {name: each - 1 for name, each in taken.items()}
    repeated = expert_adapters(model, beyond_one) - own_adapters(model, beyond_one)
    projections = sum(inputs * outputs for inputs, outputs in model.attention_widths.values())
    # In a mixture-of-depths layer a share c of the tokens attends to a share c of the positions: c^2 of all scores.
    share = model.mixture_of_depths.capacity if model.mixture_of_depths is not None else 1.0
    attending = model.num_layers - len(model.depth_layers) * (1 - share**2)
    return Parts(
        attention=(model.num_layers - layers_passed_by(model)) * 2 * projections + attending * _score_flops(model, seq_len),
        router=2 * weights.router,
        experts=2 * weights.experts,
        free=2 * weights.free,
        shared=2 * weights.shared,
        dense_ffn=2 * weights.dense_ffn,
        output=2 * model.vocab_size * model.hidden_dim,
        adapters=2 * (weights.adapters + repeated),
    )


def _score_flops(model: ModelSection, seq_len: int) -> float:
    """Returns FLOPs per token of the two products in attention, queries with keys and softmax with values. The result is
    the mean over layers, because a layer with a sliding window multiplies at most as many keys as the window has."""
    keys = sum(min(seq_len, window or seq_len) for window in model.windows) / model.num_layers
    return 2 * model.attention.score_width(model) * keys


def frozen_flops(model: ModelSection, forward: Parts, *, seq_len: int) -> float:
    """Returns forward FLOPs per token of products with frozen weights, which get no weight gradient; 0 without adapters."""
    if not model.has_adapters:
        return 0.0
    router = 0 if model.moe.experts.adapts_ffns else forward.router
    return forward.total - forward.adapters - router - model.num_layers * _score_flops(model, seq_len)


def untuned_flops(model: ModelSection, forward: Parts, *, seq_len: int, tuned: Sequence[int]) -> float:
    """Returns the FLOPs per token that training of all parameters computes, but router tuning does not.

    Backward ends at the first tuned layer, which is nearest to the input. In the first tuned layer, the router computes its
    weights' gradient, and the experts compute their input's gradient, because one autograd node exchanges rows and weights
    together. In the layers after the first tuned layer, a product with a frozen weight computes only its input's gradient,
    which costs as much as forward. Attention scores are products of two activations, and backward computes both gradients.

    Args:
        forward: Result of `forward_flops` for a model without mixture of depths.
        tuned: Indices of the layers whose routers are trained.
    """
    lowest, num_moe_layers = min(tuned), len(model.moe_layers)
    above, moe_above = model.num_layers - 1 - lowest, sum(layer > lowest for layer in model.moe_layers)
    attention = above * (forward.attention / model.num_layers + _score_flops(model, seq_len))
    router = forward.router / num_moe_layers
    moe = (forward.experts + forward.free + forward.shared) / num_moe_layers + router
    dense = (above - moe_above) * forward.dense_ffn / max(1, model.num_dense_layers)
    lowest_experts = forward.experts / num_moe_layers
    backward = forward.output + attention + moe_above * moe + dense + lowest_experts + len(tuned) * router
    return 2 * forward.total - backward


def tuned_layers(config: Config) -> tuple[int, ...] | None:
    """Returns the indices of the layers whose routers are trained, if the run trains only routers; else None."""
    return None if config.router_tuning is None else config.router_tuning.chosen_layers(config.model.moe_layers)


def flops_left_out(config: Config, forward: Parts) -> float:
    """Returns the FLOPs per token that a run saves by training only adapters or routers instead of all parameters."""
    model, seq_len, tuned = config.model, config.data.seq_len, tuned_layers(config)
    if tuned is None:
        return frozen_flops(model, forward, seq_len=seq_len)
    untuned = untuned_flops(model, forward, seq_len=seq_len, tuned=tuned)
    assert config.router_tuning is not None, "it has the tuned layers"
    # Forward and backward of the output layer then compute only a few rows of the vocabulary.
    return untuned if config.router_tuning.over_vocabulary else untuned + 2 * forward.output


def model_flops_per_token(
    experts_per_token: Mapping[str, float], token_share: Mapping[str, float], *, config: Config
) -> float:
    """Returns FLOPs per token of forward and backward, without recomputation. For arguments see `active_parameters`."""
    forward = forward_flops(
        config.model, seq_len=config.data.seq_len, experts_per_token=experts_per_token, token_share=token_share
    )
    return training_flops(forward, frozen=flops_left_out(config, forward))


def training_flops(forward: Parts, *, recompute: Recompute = "none", frozen: float = 0.0) -> float:
    """Returns FLOPs per token of forward and backward: three times the forward FLOPs, minus `frozen`, plus recomputation.
    The FLOPs of recomputation are an upper bound: these FLOPs include the last product of a recomputed module, which
    backward does not repeat.

    Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) does not count recomputation: use `recompute="none"`.
    `frozen` is the result of `frozen_flops` or `untuned_flops`."""
    repeated = {
        "none": 0.0,
        # LoRA experts are counted as `adapters`. With LoRA experts, `experts` is 0, and `shared` is the frozen FFN.
        "experts": forward.experts or forward.shared + forward.adapters,
        "block": forward.attention + forward.router + forward.experts + forward.free + forward.shared + forward.adapters,
    }[recompute]
    return 3 * forward.total - frozen + repeated
