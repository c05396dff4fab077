"""Counts the parameters and FLOPs of the transformer from its configuration. Imports no torch.

A multiplication and an addition count as two FLOPs. Only matrix products are counted. Norms, softmax, SwiGLU's product and
the weighting of expert outputs are left out: together they take below 1 % of the FLOPs. Attention scores are counted for
all positions of the sequence, as in PaLM's model FLOPs; kernels that skip masked positions compute fewer scores. Shape
letters: S sequence length, D hidden size, H query heads, d head width, F an FFN's width, V vocabulary.
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
ROUTER_BUFFERS = ("threshold", "statistics")  # tensors of routers that are not parameters


def adapter_parameters(section: Any, widths: Mapping[str, tuple[int, int]]) -> int:
    """Returns the number of parameters in the adapters of a LoRA section; 0 if `section` is None. `widths` maps each
    projection to its numbers of inputs and outputs."""
    return 0 if section is None else sum(section.rank * sum(widths[target]) for target in section.targets)


def expert_parameters(model: ModelSection) -> dict[str, int]:
    """Returns, for each group, the number of parameters in one true expert."""
    dim, experts = model.hidden_dim, model.moe.experts
    if not experts.over_frozen_ffn:
        groups = model.moe.groups.items()
        return {name: 3 * dim * group.ffn_dim + experts.num_biases(dim, group.ffn_dim) for name, group in groups}
    ffn = ffn_dim_for_all(model)
    return dict.fromkeys(
        model.moe.groups, adapter_parameters(experts, {"gate": (dim, ffn), "up": (dim, ffn), "down": (ffn, dim)})
    )


def expert_adapters(model: ModelSection, experts: Mapping[str, float]) -> float:
    """Returns the number of parameters in the adapters on `experts` experts of each group, over all MoE layers. Adapters of
    the shared expert are left out. An adapter that experts share counts once for each of these experts."""
    section, dim = model.moe.experts, model.hidden_dim
    groups, lora = model.moe.groups.items(), model.lora
    stacks = lora.rank * len(lora.parameters) if lora else 0  # matrices of two shapes: 2 ffn_dim x dim, and dim x ffn_dim
    each = {name: section.adapter_parameters(dim, g.ffn_dim) + stacks * (dim + 1.5 * g.ffn_dim) for name, g in groups}
    return len(model.moe_layers) * sum(each[name] * experts[name] for name in each)


def own_adapters(model: ModelSection, experts: Mapping[str, float]) -> float:
    """Returns the number of parameters in `expert_adapters`, without adapters that all experts share. The others exist only
    on the ranks of their experts; a shared adapter is on every rank."""
    return 0 if model.moe.experts.adapter_is_shared else expert_adapters(model, experts)


def _replicated_adapters(model: ModelSection) -> float:
    """Returns the number of parameters in adapters that every rank has: adapters on attention and on the shared expert, and
    adapters that experts share."""
    section, found = model.moe.experts, model.num_layers * adapter_parameters(model.attention_lora, model.attention_widths)
    found += 2 * model.num_layers * model.hidden_dim * model.lora.rank * len(model.lora.targets) if model.lora else 0
    found += expert_adapters(model, dict.fromkeys(model.moe.groups, 1)) if section.adapter_is_shared else 0
    return found + len(model.moe_layers) * 3 * section.shared_expert_rank * (model.hidden_dim + model.moe.shared_ffn_dim)


def ffn_dim_for_all(model: ModelSection) -> int:
    """Returns the width of an MoE layer's FFN for all tokens: of the shared expert, or of the FFN under LoRA experts."""
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
    """Returns the number of parameters in all mixture-of-depths routers. Every token uses all of them."""
    depths, dim = model.mixture_of_depths, model.hidden_dim
    auxiliary = max(1, dim // 2) * (dim + 1) if depths is not None and depths.causal == "auxiliary" else 0
    return len(model.depth_layers) * (dim + auxiliary)


@dataclass(frozen=True)
class Parts:
    """The number of parameters or FLOPs of each part of the model, over all layers."""

    embedding: float = 0  # embedding table; if tied, it also serves as the output projection
    attention: float = 0  # projections with biases and norms; FLOPs also include queries x keys and scores x values
    router: float = 0
    experts: float = 0
    free: float = 0  # vectors and gates of constant experts
    shared: float = 0  # the shared expert or, with LoRA experts, the frozen FFN
    dense_ffn: float = 0
    norms: float = 0
    output: float = 0  # output projection; if tied, it has FLOPs, but its parameters count as `embedding`
    adapters: float = 0  # LoRA experts, and LoRA adapters on attention and on experts

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def expected_experts(groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """Returns the mean number of true experts per token, for each group, under uniform routing (see `ExpertGroup`)."""
    return {group.name: group.expected_experts_per_token for group in groups}


def parameters(model: ModelSection, *, experts_held: Mapping[str, float] | None = None) -> Parts:
    """Returns the number of parameters of each part of the model. The routers' part includes rows of zero-computation
    experts. `experts_held` gives, for each group, the number of experts per layer that are counted. It may be fractional.
    By default all experts are counted."""
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
    """Returns the mean number of parameters that a token uses. Experts and layers that it does not use are left out.

    Args:
        experts_per_token: Mean number of true experts per token, by group.
        token_share: Fraction of all tokens that belong to each group.
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
    """Returns the forward FLOPs per token in each part of the model. `active_parameters` explains `experts_per_token` and
    `token_share`.

    A product with a weight of n elements takes 2 n FLOPs per token. Attention takes another 2 H d S FLOPs per token for the
    scores and 2 H d S for the values. Every token uses the router rows and constant experts of all groups.
    """
    weights = active_parameters(model, experts_per_token=experts_per_token, token_share=token_share)
    taken = {name: experts * token_share[name] for name, experts in experts_per_token.items()}
    # A token multiplies by the shared adapter once for each expert that it takes, but `weights` contains the adapter once.
    beyond_one = {name: each - 1 for name, each in taken.items()}
    repeated = expert_adapters(model, beyond_one) - own_adapters(model, beyond_one)
    projections = sum(inputs * outputs for inputs, outputs in model.attention_widths.values())
    # In a mixture-of-depths layer, a fraction c of the tokens attends to a fraction c of the positions: c^2 of all scores.
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
    """Returns the FLOPs per token of the two products in attention: queries with keys, and softmax with values. The result
    is a mean over layers, because a sliding window limits the number of keys in its layer."""
    keys = sum(min(seq_len, window or seq_len) for window in model.windows) / model.num_layers
    return 2 * model.attention.score_width(model) * keys


def frozen_flops(model: ModelSection, forward: Parts, *, seq_len: int) -> float:
    """Returns forward FLOPs per token of products with frozen weights, which get no weight gradient; 0 without adapters."""
    if not model.has_adapters:
        return 0.0
    router = 0 if model.freezes_routers else forward.router
    return forward.total - forward.adapters - router - model.num_layers * _score_flops(model, seq_len)


def untuned_flops(model: ModelSection, forward: Parts, *, seq_len: int, tuned: Sequence[int]) -> float:
    """Returns the FLOPs per token that training all parameters would compute, but router tuning does not.

    Backward ends at the first tuned layer, the one nearest to the input. There the router computes its weights' gradient,
    and the experts compute their input's gradient, because one autograd node exchanges rows and weights together. In later
    layers, backward of a product with a frozen weight computes only the input's gradient, which costs as much as forward.
    Attention scores are products of two activations, for which backward computes both gradients.

    Args:
        forward: Result of `forward_flops` for a model that has no mixture of depths.
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
    """Returns the indices of the layers whose routers are trained if the run trains only routers; else None."""
    return None if config.router_tuning is None else config.router_tuning.chosen_layers(config.model.moe_layers)


def flops_left_out(config: Config, forward: Parts) -> float:
    """Returns the FLOPs per token that a run saves if it trains only adapters or routers instead of all parameters."""
    model, seq_len, tuned = config.model, config.data.seq_len, tuned_layers(config)
    if tuned is None:
        return frozen_flops(model, forward, seq_len=seq_len)
    untuned = untuned_flops(model, forward, seq_len=seq_len, tuned=tuned)
    return untuned + 2 * forward.output if has_few_logits(config) else untuned


def has_few_logits(config: Config) -> bool:
    """Returns whether the output layer computes the logits of only a few vocabulary words. transformers' models compute
    all."""
    tuning = config.router_tuning
    return tuning is not None and not tuning.over_vocabulary and not config.engine.hosts


def model_flops_per_token(
    experts_per_token: Mapping[str, float], token_share: Mapping[str, float], *, config: Config
) -> float:
    """Returns FLOPs per token of forward and backward, without recomputation. For arguments see `active_parameters`."""
    forward = forward_flops(
        config.model, seq_len=config.data.seq_len, experts_per_token=experts_per_token, token_share=token_share
    )
    return training_flops(forward, frozen=flops_left_out(config, forward))


def training_flops(forward: Parts, *, recompute: Recompute = "none", frozen: float = 0.0) -> float:
    """Returns the FLOPs per token of forward and backward: three times the forward FLOPs, minus `frozen`, plus
    recomputation. The FLOPs of recomputation are an upper bound, because they include the last product of a recomputed
    module, which backward does not repeat.

    Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) does not count recomputation, so use `recompute="none"` for
    it. `frozen` is the result of `frozen_flops` or `untuned_flops`."""
    repeated = {
        "none": 0.0,
        # LoRA experts are counted as `adapters`. `experts` is then 0, and `shared` is the frozen FFN.
        "experts": forward.experts or forward.shared + forward.adapters,
        "block": forward.attention + forward.router + forward.experts + forward.free + forward.shared + forward.adapters,
    }[recompute]
    return 3 * forward.total - frozen + repeated
