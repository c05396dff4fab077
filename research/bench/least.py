"""Computes the smallest possible FLOPs of a training step, and the fewest bytes that each part of it can read and write.

All tensors between operations have the compute dtype. Each matrix product reads its factors once and writes its result
once. Products with the same input count as one product. Norms, rotary embeddings, SwiGLU and residuals are fused with
neighbouring matrix products. Logits are never in memory, and attention stores no scores. One kernel packs token rows to
send, one kernel sums each row's (token, expert) pairs, and one kernel sums each token's rows. Nothing is recomputed.
Shape letters: T tokens of the rank, D hidden size, F hidden width of an expert.
"""

from moe_dist.config.schema import Config
from moe_dist.placement.placement import group_shares
from moe_dist.plan import flops, memory
from moe_dist.plan.preflight import PlannedLayout
from research.fake_gpu.fake_step import Uniform

Key = tuple[str, str]  # part and phase
OPTIMIZER = 32  # bytes per fp32 parameter: reads of weight, gradient and 2 moments, 3 writes, and 1 read for the norm


def least_flops(config: Config, layout: PlannedLayout) -> dict[Key, float]:
    """Returns the smallest possible FLOPs of one micro-batch on an average rank, summed over layers, by part and phase.
    Attention skips the positions after a token's own position."""
    model, tokens = config.model, config.train.micro_batch * config.data.seq_len
    shares = dict(zip((group.name for group in layout.groups), group_shares(layout.groups, {}), strict=True))
    taken = flops.expected_experts(layout.groups)
    parts = flops.forward_flops(model, seq_len=config.data.seq_len, experts_per_token=taken, token_share=shares)
    forward = {
        "attention": parts.attention - masked_scores(config),
        "moe": parts.router + parts.experts + parts.free + parts.shared + parts.adapters,
        "ffn": parts.dense_ffn,
        "model": parts.output,
    }
    phases = (("forward", 1), ("backward", 2))
    return {(part, phase): times * tokens * each for part, each in forward.items() if each for phase, times in phases}


def masked_scores(config: Config) -> float:
    """Returns the forward FLOPs of a token's attention scores for positions after the token's own position.
    `moe_dist.plan.flops` counts these FLOPs, but a kernel for causal attention skips them."""
    return config.model.num_layers * config.model.attention.score_width(config.model) * config.data.seq_len


def least_bytes(config: Config, layout: PlannedLayout, rank: int) -> dict[Key, float]:
    """Returns the fewest bytes that a rank reads and writes in memory, by part and phase. They are the bytes of one
    micro-batch over all layers, and of a step's optimizer update. Not for LoRA, shared experts or mixture of depths."""
    model, item = config.model, memory.ITEMSIZE[config.parallel.precision]
    tokens, dim = config.train.micro_batch * config.data.seq_len, model.hidden_dim
    widths, ffn = model.attention_widths, model.dense_ffn_dim or 0
    weights, results = sum(i * o for i, o in widths.values()), sum(o for _, o in widths.values())
    inputs = sum(i for name, (i, _) in widths.items() if name not in ("k", "v", "kv_down"))  # k and v share q's input
    products, heads = tokens * (inputs + results) + weights, widths["o"][0]
    scores = tokens * (results - dim + heads)  # query, key, value and output
    vocabulary, stream = model.vocab_size * dim, tokens * dim
    found = {
        ("attention", "forward"): model.num_layers * (products + scores),
        ("attention", "backward"): model.num_layers * (2 * products + 2 * scores + tokens * heads),
        ("ffn", "forward"): model.num_dense_layers * (tokens * (2 * dim + 3 * ffn) + 3 * dim * ffn),
        ("ffn", "backward"): model.num_dense_layers * (tokens * (4 * dim + 10 * ffn) + 6 * dim * ffn),
    }
    found |= {("moe", phase): len(model.moe_layers) * n for phase, n in experts(config, layout, rank).items()}
    residuals = 2 * model.num_layers * stream
    found |= {("model", "forward"): residuals + 2 * stream + vocabulary}
    found |= {("model", "backward"): residuals + 3 * stream + 2 * vocabulary}
    held = memory.held_parameters(config, layout.placement, rank=rank % config.parallel.ep)
    return {key: item * each for key, each in found.items()} | {("step", "step"): OPTIMIZER * held}


def experts(config: Config, layout: PlannedLayout, rank: int) -> dict[str, float]:
    """Returns the number of elements that the experts of one MoE layer read and write, by phase. It includes matrix
    products, and the packing and summing of token rows."""
    uniform, dim, ranks = Uniform(config, layout, rank, whole=True), config.model.hidden_dim, config.parallel.ep
    width_E = [group.ffn_dim for group in layout.groups for _ in group.experts]
    slots = layout.placement.slots[uniform.own]
    own, *pairs = uniform.entry(uniform.own)
    sent = sum(uniform.entry(each)[0] for each in range(ranks)) - own
    # The kernel that sums pairs writes the rows of all ranks' tokens. The kernel that packs rows reads and writes the rows
    # to send. The kernel that sums rows reads and writes rows.
    rows = (ranks * own + 2 * sent + sent + own + config.train.micro_batch * config.data.seq_len) * dim
    wide = sum(number * width_E[slot] for number, slot in zip(pairs, slots, strict=True)) * ranks
    weights, pairs = 3 * dim * sum(width_E[slot] for slot in slots), ranks * sum(pairs) * dim
    return {"forward": 3 * pairs + 3 * wide + weights + rows, "backward": 5 * pairs + 10 * wide + 2 * weights + rows}
