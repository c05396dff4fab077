"""Estimates a rank's memory under tensor, pipeline and context parallelism (engine.kind=megatron). Imports no torch.

    weights      experts s; (attention, dense and shared FFNs) s / tp; routers, norms and projections to latents s;
                 embedding or output / tp
    gradients    fp32, of all these weights
    optimizer    two moments in fp32; with engine.distributed_optimizer a rank has only a fraction of them and of the fp32
                 weights: 1 / (edp / pp) for experts, and 1 / (dp cp) for all other parameters
    activations  as in `moe_dist.plan.memory`, for the layers of a stage and the tokens of a rank, times the micro-batches
                 that the first stage has at once: pp, or pp + (pp - 1) / vpp if interleaved

s is the fullest stage's share of the layers: 1 / pp if stages are equal. The estimate assumes that this stage has the same
share of the MoE layers.
"""

from typing import Any

from moe_dist.config.schema import Config
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.flops import parameters
from moe_dist.plan.memory import FP32, ITEMSIZE, RankMemory, held_experts, layer_bytes_per_token, output_bytes_per_token


def stage_memory(config: Config, placement: ExpertPlacement, *, rank: int, rows: float, pairs: float) -> RankMemory:
    """Returns the memory of the rank at position `rank` of an EP group. For the arguments see `rank_memory`."""
    engine: Any = config.engine
    parallel, itemsize = config.parallel, ITEMSIZE[config.parallel.precision]
    parts = parameters(config.model, experts_held=held_experts(placement, rank))
    share = engine.share_of_fullest_stage(config.model.num_layers)
    widths = config.model.attention_widths.items()
    down = config.model.num_layers * sum(rows * columns for name, (rows, columns) in widths if name.endswith("_down"))
    cut = ((parts.attention - down + parts.dense_ffn + parts.shared) / engine.tp + down) * share
    words = (parts.embedding + parts.output if engine.pp == 1 else max(parts.embedding, parts.output)) / engine.tp
    dense = cut + words + (parts.router + parts.norms) * share
    experts = parts.experts * share
    ranks = engine.data_ranks(parallel)
    shards = (ranks * engine.cp, parallel.edp // engine.pp) if engine.distributed_optimizer else (1, 1)
    updated = dense / shards[0] + experts / shards[1]
    held = dense + experts
    half = itemsize < FP32  # if True, the computation uses bf16 weights, and the optimizer has fp32 copies of them
    micro_batches = config.train.global_batch // (config.train.micro_batch * ranks)
    at_once = min(micro_batches, engine.pp + (engine.pp - 1) / engine.vpp if engine.vpp > 1 else engine.pp)
    tokens = config.train.micro_batch * config.data.seq_len / (engine.tp * engine.cp)
    layers = sum(layer_bytes_per_token(config, rows, pairs)) * share
    # The first stage has the most micro-batches at once, but only the last stage has the output layer.
    output = output_bytes_per_token(config) if engine.pp == 1 else 0.0
    return RankMemory(
        parameters=(updated if half else held) * FP32,
        gradients=held * FP32,
        optimizer=2 * updated * FP32,
        casts=held * itemsize if half else 0.0,
        activations=tokens * (layers * at_once + output),
        exchange_bound=2 * (parallel.ep - 1) * tokens * config.model.hidden_dim * itemsize,
    )
