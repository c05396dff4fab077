"""Estimates the memory of a training rank from plain sizes. Imports no torch.

States are exact: fp32 master weights, fp32 gradients and AdamW's two fp32 moments of the rank's parameters (frozen ones
have only weights). Activations are an estimate of the tensors that autograd keeps for one micro-batch, in elements of a
bytes for each token:

    attention   2 D + 3 H d + 3 H_kv d (with qk_norm 4 and 4)   input, norm, projections, rotated, output
    MoE         3 D + rows D + 4 F of the shared expert         rows at this rank for each own token
                + pairs (2 D + 4 F)                             pairs likewise; inputs, SwiGLU and outputs
                + pairs (2 D + F) of LoRA experts               inputs of their adapters; 4 F of the frozen FFN above
                + 12 C bytes in fp32                            router (C: the columns of all kinds)
                + 4 D bytes in fp32 where a < 4                 router input; the same for zero-computation experts
    dense FFN   2 D + 4 F
    output      D + V, and 8 V bytes in fp32                    logits, their fp32 copy and its gradient

`recompute: experts` does not keep tensors of pairs. `block` keeps the inputs of both halves of a layer and the returned
rows. Both need the rest once, for one layer. If only routers are trained, frozen weights do not keep their inputs, and
nothing is kept below the lowest of these routers. `block` cannot repeat the layer of that router, since its input has no
gradient:

    attention   D + 2 H d + 2 H_kv d                            not in the lowest layer
    MoE         2 D + rows D + 3 F of the shared expert + pairs (D + 3 F) + 12 C bytes in fp32; D less in the lowest layer
    dense FFN   D + 3 F

RMSNorm keeps more on CPU. Allocator slack, kernels' scratch space and libraries (1 to 2 GB on CUDA) are extra.
"""

from dataclasses import dataclass

from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.flops import Recompute, Shape, parameters

FP32 = 4
CHECKPOINT_BYTES = 12  # for each parameter: fp32 weight and two fp32 moments


@dataclass(frozen=True)
class Tuned:
    """Sizes of a run that trains only routers.

    Attributes:
        routers: Number of layers whose routers are trained.
        num_layers, num_moe_layers: Number of layers from the lowest of these upwards.
    """

    routers: int
    num_layers: int
    num_moe_layers: int


@dataclass(frozen=True)
class MemoryLayout:
    """How ranks share the model, and what is trained, as plain values.

    Attributes:
        ep, edp: Ranks of an EP group, and number of EP groups.
        sharded: Whether dense parameters are sharded over all ranks and experts over edp (FSDP2); routers never are.
        itemsize: Bytes of an element of the compute type.
        tokens: Tokens of a rank's micro-batch.
        max_receive_rows: Bound of the rows received in one layer; None for the bound that always holds.
        tuned: For a run that trains only routers.
    """

    ep: int
    edp: int
    sharded: bool
    itemsize: int
    recompute: Recompute
    tokens: int
    max_receive_rows: int | None = None
    tuned: Tuned | None = None


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    Attributes:
        parameters, gradients, optimizer: fp32 states.
        casts: Weights in the compute type during a micro-batch: all under DDP (autograd keeps each cast), two units under
            FSDP2; none in fp32 under DDP.
        activations: Estimate for one micro-batch.
        exchange_bound: Send and receive buffers of one layer if every token goes to one rank; not part of any sum.
    """

    parameters: float
    gradients: float
    optimizer: float
    casts: float
    activations: float
    exchange_bound: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.casts + self.activations


def rank_memory(
    shape: Shape, placement: ExpertPlacement, layout: MemoryLayout, *, rank: int, rows: float, pairs: float
) -> RankMemory:
    """Memory of EP position `rank`.

    Args:
        rows, pairs: Expected rows and (token, expert) pairs that the rank computes for each of its own tokens.
    """
    held = held_parameters(shape, placement, layout, rank=rank)
    trained = trained_parameters(shape, layout) if shape.frozen_base or layout.tuned else held
    exchange_rows = 2 * (layout.ep - 1) * layout.tokens
    if layout.max_receive_rows is not None:
        exchange_rows = min(exchange_rows, (layout.ep - 1) * layout.tokens + layout.max_receive_rows)
    return RankMemory(
        parameters=held * FP32,
        gradients=trained * FP32,
        optimizer=2 * trained * FP32,
        casts=_casts(shape, placement, layout, rank) * layout.itemsize,
        activations=layout.tokens * _activation_bytes_per_token(shape, layout, rows, pairs),
        exchange_bound=exchange_rows * shape.hidden_dim * layout.itemsize,
    )


def held_parameters(shape: Shape, placement: ExpertPlacement, layout: MemoryLayout, *, rank: int) -> float:
    """Parameters whose master values EP position `rank` holds."""
    parts = parameters(shape, experts_held=_local(shape, placement, rank))
    dense = parts.total - parts.router - parts.experts
    world = layout.ep * layout.edp
    return parts.router + (dense / world + parts.experts / layout.edp if layout.sharded else dense + parts.experts)


def trained_parameters(shape: Shape, layout: MemoryLayout) -> float:
    """Trained parameters on a rank of a run that trains only adapters and routers, or only some routers."""
    if layout.tuned is not None:
        return tuned_parameters(shape, layout.tuned)
    parts, world = parameters(shape), layout.ep * layout.edp
    return parts.router + (parts.adapters / world if layout.sharded else parts.adapters)


def tuned_parameters(shape: Shape, tuned: Tuned) -> float:
    """Parameters of the trained routers of a run that trains only these; all layers have the same, and every rank holds
    all."""
    return parameters(shape).router * tuned.routers / shape.num_moe_layers


def checkpoint_bytes(shape: Shape, tuned: Tuned | None = None) -> float:
    """Size of one checkpoint over all ranks: weights and moments in fp32. With adapters, without the base; if only routers
    are trained, all weights and the moments of these routers."""
    parts = parameters(shape)
    if tuned is not None:
        return parts.total * FP32 + tuned_parameters(shape, tuned) * (CHECKPOINT_BYTES - FP32)
    return (parts.adapters + parts.router if shape.frozen_base else parts.total) * CHECKPOINT_BYTES


def _local(shape: Shape, placement: ExpertPlacement, rank: int) -> dict[str, float]:
    return {group.name: len(placement.local_experts(rank, group)) for group in shape.groups}


def _casts(shape: Shape, placement: ExpertPlacement, layout: MemoryLayout, rank: int) -> float:
    parts = parameters(shape, experts_held=_local(shape, placement, rank))
    if not layout.sharded:
        return parts.total - parts.router if layout.itemsize < FP32 else 0.0
    attention = parts.attention / shape.num_layers
    moe = (parts.experts + parts.free + parts.shared + parts.adapters) / max(1, shape.num_moe_layers)
    ffn = parts.dense_ffn / max(1, shape.num_dense_layers)
    # The root unit (embedding, output) stays gathered; of the layers one is in use while the next is being gathered.
    return parts.embedding + parts.output + attention + max(moe, ffn)


def _activation_bytes_per_token(shape: Shape, layout: MemoryLayout, rows: float, pairs: float) -> float:
    if layout.tuned is not None:
        return _tuned_bytes_per_token(shape, layout, layout.tuned, rows, pairs)
    s, dim, a = shape, shape.hidden_dim, layout.itemsize
    copies = 3 if s.qk_norm == "none" else 4
    attention = a * (2 * dim + copies * (s.num_heads + s.num_kv_heads) * s.head_dim)
    free = any(group.num_identity or group.num_constant for group in s.groups)
    columns = sum(group.num_columns for group in s.groups)
    inside = pairs * a * (2 * dim + (1 if s.lora else 4) * _mean_ffn(shape))
    moe = a * (3 * dim + rows * dim + 4 * s.for_all_ffn_dim) + FP32 * (3 * columns + ((1 + free) * dim if a < FP32 else 0))
    dense = a * (2 * dim + 4 * s.dense_ffn_dim)
    output = a * dim + s.vocab_size * (a + 2 * FP32)
    if layout.recompute == "block":
        kept = a * dim * 2 + rows * a * dim
        once = attention + moe + inside
        return s.num_moe_layers * kept + s.num_dense_layers * (a * dim + dense) + once + output
    moe += 0 if layout.recompute == "experts" else inside
    once = inside if layout.recompute == "experts" else 0.0
    passed_by = s.layers_passed_by
    layers, moe_layers = s.num_layers - passed_by, s.num_moe_layers - passed_by
    return layers * attention + moe_layers * moe + s.num_dense_layers * dense + once + output


def _tuned_bytes_per_token(shape: Shape, layout: MemoryLayout, tuned: Tuned, rows: float, pairs: float) -> float:
    s, dim, a = shape, shape.hidden_dim, layout.itemsize
    attention = a * (dim + 2 * (s.num_heads + s.num_kv_heads) * s.head_dim)
    columns = sum(group.num_columns for group in s.groups)
    moe = a * (2 * dim + rows * dim + 3 * s.for_all_ffn_dim) + FP32 * 3 * columns
    inside = pairs * a * (dim + 3 * _mean_ffn(shape))
    dense = a * (dim + 3 * s.dense_ffn_dim)
    output = a * dim + s.vocab_size * (a + 2 * FP32)
    num_dense = tuned.num_layers - tuned.num_moe_layers
    above = tuned.num_moe_layers - 1
    if layout.recompute == "block":
        kept = above * a * dim * (2 + rows) + num_dense * (a * dim + dense)
        once = attention + moe + inside if above else 0.0
        return moe - a * dim + inside + kept + once + output
    times = 1 if layout.recompute == "experts" else tuned.num_moe_layers
    layers = (tuned.num_layers - 1) * attention + tuned.num_moe_layers * moe - a * dim
    return layers + times * inside + num_dense * dense + output


def _mean_ffn(shape: Shape) -> float:
    """FFN width of a mean pair under a uniform router and an even mix."""
    pairs = [group.expected_experts_per_token for group in shape.groups]
    return sum(p * group.ffn_dim for p, group in zip(pairs, shape.groups, strict=True)) / sum(pairs)
