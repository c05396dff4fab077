"""Estimates the memory of a training rank from the configuration. Imports no torch.

The memory of weights, gradients and optimizer is exact: a rank has fp32 master weights, fp32 gradients and AdamW's two
moments of its parameters. Muon has only one moment for each matrix of attention, FFNs and experts. Frozen parameters have
only weights. The memory of activations is an estimate: it counts the tensors that autograd keeps for one micro-batch. The
table gives the number of elements per token, each of `a` bytes (2 in bf16, 4 in fp32):

    attention   2 D + 3 (H + H_kv) d (4, not 3, with qk_norm)   input, norm, projections, rotated, output
                2 D + 3 (q_rank + kv_rank) + 2 H (d + value_dim) the same for latent attention
    MoE         3 D + rows D + 4 F of the shared expert         rows that this rank computes per own token
                + pairs (2 D + 4 F)                             pairs per own token: inputs, SwiGLU and outputs
                + pairs (2 D + F) of LoRA experts               inputs of their adapters; the frozen FFN counts as shared
                + 12 C bytes in fp32                            router (C: the columns of all kinds)
                + 4 D bytes in fp32 where a < 4                 router input; the same for zero-computation experts
    dense FFN   2 D + 4 F
    output      D + V, and 8 V bytes in fp32                    logits, their fp32 copy and its gradient
                or D, and 4 D bytes in fp32                     if the loss computes v < V words at once; one sequence at a
                                                                time also has v, and 8 v bytes in fp32

With Triton kernels (on GPUs, unless `parallel.kernels.kind` is torch) autograd keeps less, as the next table shows. With
`parallel.compile` only its line MoE applies, because torch itself fuses attention and output:

    attention   D + 2 (H + H_kv) d (3, not 2, with qk_norm)     neither the norm, if there are no biases (else 2 D), nor
                                                                the projections before the rotation
    MoE         2 D + 4 D bytes in fp32 + pairs (D + 3 F)       neither rows nor the pairs' outputs
    output      D + 2 V                                         no fp32 logits

With `recompute: experts` autograd does not keep the tensors of (token, expert) pairs. With `recompute: block` it keeps only
the inputs of each layer's attention and of its MoE layer or FFN, and the returned rows. Recomputed tensors exist only for
one layer at a time, and never together with the output layer's tensors, which backward frees first. If only routers are
trained, autograd keeps neither inputs of frozen weights nor tensors of layers before the first trained router. `recompute:
block` cannot recompute the layer of the first trained router, since its input has no gradient:

    attention   D + 2 H d + 2 H_kv d                            not in the first such layer
                D + q_rank + kv_rank + 2 H (d + value_dim)      the same for latent attention
    MoE         2 D + rows D + 3 F of the shared expert + pairs (D + 3 F) + 12 C bytes in fp32; D less in the first
    dense FFN   D + 3 F

With `device: cpu` torch keeps more, except in router tuning. Each of the 2 L norms in layers keeps its output before the
multiplication by the weight (D). Each attention keeps the document mask in its inputs' dtype (S elements per token).
Allocator slack, kernels' scratch space and libraries (1 to 2 GB on CUDA) are not counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_dist.config.model_schema import ModelSection
from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.flops import (
    ffn_dim_for_all,
    has_few_logits,
    layers_passed_by,
    own_adapters,
    parameters,
    tuned_layers,
)
from moe_dist.plan.policies import expert_groups

FP32 = 4
ITEMSIZE: dict[Literal["fp32", "bf16"], int] = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class RankMemory:
    """Numbers of bytes that one rank uses for each purpose. The bytes of activations are an estimate."""

    parameters: float  # fp32 master weights
    gradients: float  # fp32 gradients; with fsdp_gather=step also the gradients of gathered parameters
    optimizer: float
    # Weights in the compute dtype during a micro-batch. DDP: copies of all weights in bf16, no copies in fp32. FSDP2: the
    # weights of two units, or of all units with fsdp_gather=step; with edp=1 in bf16 also all experts, because FSDP2 does
    # not shard them. The weights of replicas are included.
    casts: float
    activations: float  # estimate for the activations of one micro-batch
    exchange_bound: float  # bytes of one layer's send and receive buffers if every token goes to one rank; not in `total`
    # Bytes that `total` leaves out. In a step with one micro-batch, backward frees activations while it makes gradients, so
    # not all of both exist at once. Gradients in DDP's buckets are counted in full, because buckets always exist.
    in_turn: float = 0.0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.casts + self.activations - self.in_turn


def rank_memory(config: Config, placement: ExpertPlacement, *, rank: int, rows: float, pairs: float) -> RankMemory:
    """Estimates the memory of the rank at position `rank` of an EP group. `rows` and `pairs` are the expected numbers of
    rows that it receives and of (token, expert) pairs that it computes, divided by the number of its own tokens."""
    parallel, itemsize = config.parallel, ITEMSIZE[config.parallel.precision]
    tokens = config.train.micro_batch * config.data.seq_len
    held, trained = (each(config, placement, rank=rank) for each in (held_parameters, trained_parameters))
    exchange_rows = 2 * (parallel.ep - 1) * tokens
    if parallel.max_receive_rows is not None:
        exchange_rows = min(exchange_rows, (parallel.ep - 1) * tokens + parallel.max_receive_rows)
    summed = _gathered(config, placement, rank) if _gathers_once(config) else 0.0
    activations = tokens * _activation_bytes_per_token(config, rows, pairs)
    gradients = (trained + summed) * FP32
    single = config.train.global_batch <= config.train.micro_batch * parallel.ep * parallel.edp
    buckets = trained_parts(config, held_experts(placement, rank)).dense * FP32 if parallel.data == "ddp" else 0.0
    return RankMemory(
        parameters=held * FP32,
        gradients=gradients,
        optimizer=(2 * trained - _sharded(config, *_with_one_moment(config, held_experts(placement, rank)))) * FP32,
        casts=(_casts(config, placement, rank) + _replicas(config)) * itemsize,
        activations=activations,
        exchange_bound=exchange_rows * config.model.hidden_dim * itemsize,
        in_turn=min(gradients - buckets, activations) if single else 0.0,
    )


def held_parameters(config: Config, placement: ExpertPlacement, *, rank: int) -> float:
    """Returns the number of fp32 parameters on the rank at position `rank` of an EP group. FSDP2 shards dense parameters
    over all ranks. It shards experts, and adapters that belong to single experts, over the edp ranks, which have the same
    experts. Routers are not sharded."""
    parts = parameters(config.model, experts_held=held_experts(placement, rank))
    experts = parts.experts + own_adapters(config.model, held_experts(placement, rank))
    return parts.router + _sharded(config, parts.total - parts.router - experts, experts)


def _sharded(config: Config, dense: float, experts: float) -> float:
    parallel = config.parallel
    if parallel.data != "fsdp2":
        return dense + experts
    return dense / (parallel.ep * parallel.edp) + experts / parallel.edp


def _with_one_moment(config: Config, experts_held: dict[str, float] | None = None) -> tuple[float, float]:
    """Returns how many dense and how many expert parameters have one moment instead of two in the optimizer."""
    if not config.optimizer.orthogonal:
        return 0.0, 0.0
    model, parts = config.model, parameters(config.model, experts_held=experts_held)
    attention = model.num_layers * sum(inputs * outputs for inputs, outputs in model.attention_widths.values())
    # the gate of a shared expert is a vector, so it has two moments
    shared = parts.shared - len(model.moe_layers) * model.hidden_dim * model.moe.shared_gate
    held = experts_held or {name: group.num_experts for name, group in model.moe.groups.items()}
    groups, each = model.moe.groups.items(), model.moe.experts.num_biases
    biases = sum(held[name] * each(model.hidden_dim, group.ffn_dim) for name, group in groups)
    return attention + shared + parts.dense_ffn, parts.experts - len(model.moe_layers) * biases


class Trained(NamedTuple):
    """Numbers of trained parameters before FSDP2 shards them: in routers, other parts that all ranks have, and experts."""

    router: float
    dense: float
    experts: float


def trained_parts(config: Config, experts_held: Mapping[str, float]) -> Trained:
    """Returns the trained parameters of a rank that has `experts_held` experts of each group and their adapters. A run
    trains all parameters, only adapters and routers, or only some routers."""
    if config.router_tuning is not None:
        return Trained(tuned_parameters(config), 0.0, 0.0)
    parts, own = parameters(config.model, experts_held=experts_held), own_adapters(config.model, experts_held)
    if config.model.has_adapters:
        return Trained(0.0 if config.model.freezes_routers else parts.router, parts.adapters - own, own)
    return Trained(parts.router, parts.total - parts.router - parts.experts - own, parts.experts + own)


def trained_parameters(config: Config, placement: ExpertPlacement, *, rank: int) -> float:
    """Returns the number of trained parameters on a rank. They are counted as in `held_parameters`."""
    trained = trained_parts(config, held_experts(placement, rank))
    return trained.router + _sharded(config, trained.dense, trained.experts)


def tuned_parameters(config: Config) -> float:
    """Returns the number of parameters that router tuning trains on every rank. All layers have routers of equal size."""
    return parameters(config.model).router * len(tuned_layers(config) or ()) / len(config.model.moe_layers)


def checkpoint_bytes(config: Config) -> float:
    """Returns the size in bytes of one checkpoint of all ranks: fp32 weights, and moments. A run that trains adapters saves
    no frozen weights. Router tuning saves all weights, and the moments of the trained routers."""
    parts = parameters(config.model)
    if config.router_tuning is not None:
        return parts.total * FP32 + tuned_parameters(config) * 2 * FP32
    router = 0 if config.model.freezes_routers else parts.router
    saved = parts.adapters + router if config.model.has_adapters else parts.total
    return (3 * saved - sum(_with_one_moment(config))) * FP32


def folder_bytes(config: Config) -> int:
    """Returns the largest total size of a run's checkpoints: `checkpoint.keep` of them, and one that is being written."""
    return (config.checkpoint.keep + 1) * round(checkpoint_bytes(config))


def held_experts(placement: ExpertPlacement, rank: int) -> dict[str, float]:
    """Returns the number of experts of each group on the rank at position `rank` of an EP group."""
    return {group.name: len(placement.local_experts(rank, group)) for group in placement.groups}


def _gathers_once(config: Config) -> bool:
    return config.parallel.data == "fsdp2" and config.parallel.fsdp_gather == "step"


def _gathered(config: Config, placement: ExpertPlacement, rank: int) -> float:
    """Returns the number of trained parameters that FSDP2 shards, and gathers on this rank for the computation."""
    model, held = config.model, held_experts(placement, rank)
    parts, alone = parameters(model, experts_held=held), config.parallel.edp == 1  # with edp=1 FSDP2 does not shard experts
    if model.has_adapters or config.router_tuning:
        return parts.adapters - (own_adapters(model, held) if alone else 0.0)
    return parts.total - parts.router - (parts.experts if alone else 0.0)


def _casts(config: Config, placement: ExpertPlacement, rank: int) -> float:
    model, held = config.model, held_experts(placement, rank)
    parts = parameters(model, experts_held=held)
    experts = parts.experts + own_adapters(model, held)
    plain = experts if config.parallel.edp == 1 else 0.0  # parameters that FSDP2 does not shard
    kept = plain if ITEMSIZE[config.parallel.precision] < FP32 else 0.0
    if _gathers_once(config):
        return parts.total - parts.router - plain + kept
    if config.parallel.data != "fsdp2":
        return parts.total - parts.router if ITEMSIZE[config.parallel.precision] < FP32 else 0.0
    attention = parts.attention / model.num_layers
    moe = (parts.experts + parts.adapters - plain + parts.free + parts.shared) / len(model.moe_layers)
    ffn = parts.dense_ffn / max(1, model.num_dense_layers)
    # FSDP2 keeps the weights of the root unit (embedding, output) gathered. During a layer it gathers the next layer's
    # weights.
    return parts.embedding + parts.output + attention + max(moe, ffn) + kept


def _replicas(config: Config) -> float:
    """Returns the largest number of parameters in replicas that a rank keeps until backward, plus the number of gradients
    of one layer's replicas."""
    section, model = config.rank_balance.replicating, config.model
    if section is None or config.parallel.ep == 1:
        return 0.0
    layers = 1 if config.parallel.recompute == "block" else len(model.moe_layers)
    widest = max(group.ffn_dim for group in model.moe.groups.values())
    return section.slots * 3 * model.hidden_dim * widest * (layers + 1)


def _activation_bytes_per_token(config: Config, rows: float, pairs: float) -> float:
    layers = layer_bytes_per_token(config, rows, pairs)
    return layers.kept + max(layers.once, output_bytes_per_token(config))  # backward frees the output layer's tensors first


class LayerBytes(NamedTuple):
    """Bytes per token of the tensors that autograd keeps in all layers, and of one layer's recomputed tensors."""

    kept: float
    once: float


def layer_bytes_per_token(config: Config, rows: float, pairs: float) -> LayerBytes:
    """Returns the bytes per token of the tensors that autograd keeps, and of the recomputed tensors."""
    model, a, recompute = config.model, ITEMSIZE[config.parallel.precision], config.parallel.recompute
    dim, groups = model.hidden_dim, expert_groups(model.moe)
    ffn_for_all, ffn = ffn_dim_for_all(model), model.dense_ffn_dim or 0
    columns, mean_ffn = sum(group.num_columns for group in groups), _mean_ffn(model)
    if tuned := tuned_layers(config):
        attention, dense = a * (dim + model.attention.kept(model, frozen=True)), a * (dim + 3 * ffn)
        moe = a * (2 * dim + rows * dim + 3 * ffn_for_all) + FP32 * 3 * columns
        inside = pairs * a * (dim + 3 * mean_ffn)
        num_layers, num_moe_layers = model.num_layers - min(tuned), sum(each >= min(tuned) for each in model.moe_layers)
        num_dense, above = num_layers - num_moe_layers, num_moe_layers - 1
        if recompute == "block":
            kept = above * a * dim * (2 + rows) + num_dense * (a * dim + dense)
            once = attention + moe + inside if above else 0.0
            return LayerBytes(moe - a * dim + inside + kept, once)
        layers = (num_layers - 1) * attention + num_moe_layers * moe - a * dim + num_dense * dense
        return LayerBytes(layers, inside) if recompute == "experts" else LayerBytes(layers + num_moe_layers * inside, 0.0)
    attention, dense = a * (2 * dim + model.attention.kept(model, frozen=False)), a * (2 * dim + 4 * ffn)
    on_cpu = config.engine.own_kernels and config.parallel.device == "cpu"
    attention, dense = attention + on_cpu * a * (dim + config.data.seq_len), dense + on_cpu * a * dim
    if _has_dense_kernels(config):
        attention -= a * (model.attention.rotated(model) + dim * model.attention.norms_again(model))
    free = any(group.num_identity or group.num_constant for group in groups)
    if model.moe.experts.over_frozen_ffn:
        kept, inside = 3 * dim + rows * dim, pairs * a * (2 * dim + mean_ffn)
    elif _has_triton(config):
        kept, inside = 2 * dim + (rows * dim if recompute == "experts" else 0), pairs * a * (dim + 3 * mean_ffn)
    else:
        kept, inside = 3 * dim + rows * dim, pairs * a * (2 * dim + 4 * mean_ffn)
    moe = a * (kept + on_cpu * dim + 4 * ffn_for_all) + FP32 * (3 * columns + ((1 + free) * dim if a < FP32 else 0))
    num_moe_layers, num_dense = len(model.moe_layers), model.num_dense_layers
    if recompute == "block":
        kept = a * dim * 2 + rows * a * dim
        once = attention + moe + inside
        return LayerBytes(num_moe_layers * kept + num_dense * (a * dim + dense), once)
    moe += 0 if recompute == "experts" else inside
    once = inside if recompute == "experts" else 0.0
    passed_by = layers_passed_by(model)
    layers = (model.num_layers - passed_by) * attention + (num_moe_layers - passed_by) * moe + num_dense * dense
    return LayerBytes(layers, once)


def _has_triton(config: Config) -> bool:
    """Returns whether the run is sure to use Triton kernels. A run in bf16 without a configured device is assumed to have
    GPUs."""
    parallel = config.parallel
    on_gpu = parallel.device == "cuda" or (parallel.device == "auto" and parallel.precision == "bf16")
    return config.engine.own_kernels and on_gpu and parallel.kernels.kind != "torch" and not parallel.kernels.fallback


def _has_dense_kernels(config: Config) -> bool:
    """Returns whether Triton kernels compute norms, rotary embedding and loss. They do not if the model is compiled."""
    return _has_triton(config) and not config.parallel.compile


def output_bytes_per_token(config: Config) -> float:
    """Returns the bytes per token that autograd keeps for the output projection and the cross entropy."""
    model, a = config.model, ITEMSIZE[config.parallel.precision]
    if has_few_logits(config):
        return a * model.hidden_dim  # the few logits are not counted
    words = config.parallel.loss_words_of(model.vocab_size)
    if words is None and _has_dense_kernels(config):
        return a * (model.hidden_dim + 2 * model.vocab_size)
    if words is None:
        return a * model.hidden_dim + model.vocab_size * (a + 2 * FP32)
    return (a + FP32) * model.hidden_dim + words * (a + 2 * FP32) / config.train.micro_batch


def _mean_ffn(model: ModelSection) -> float:
    """Returns the mean FFN width over (token, expert) pairs, if routing is uniform and groups have equal token numbers."""
    groups = expert_groups(model.moe)
    pairs = [group.expected_experts_per_token for group in groups]
    return sum(p * group.ffn_dim for p, group in zip(pairs, groups, strict=True)) / sum(pairs)
