"""Compares throughputs that the step model predicts from data sheets with published throughputs: python -m
research.bench.published

Rows without a `note` are predicted for the published layout. All predictions assume uniform routing; NVIDIA's measurements
force balanced routing.
"""

from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from moe_dist.config.load import load_config
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.plan.estimate import LayoutEstimator
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.rates import published_rates
from moe_dist.plan.rows import Expected


class Row(NamedTuple):
    """A published measurement. `measured` is in tokens/s of a GPU, and `between` in bytes/s from a GPU to other nodes.
    `node` is the number of GPUs of a node."""

    model: str
    source: str
    card: str
    gpus: int
    ep: int
    batch: int
    micro: int
    seq_len: int
    measured: float
    node: int
    between: float
    note: str


BRIDGE, NOUS = "Megatron Bridge 25.11", "torchtitan fork of Nous Research"
QWEN30 = (
    "model.hidden_dim=2048 model.num_layers=48 model.num_heads=32 model.num_kv_heads=4 model.head_dim=128 "
    "model.vocab_size=151936 model.qk_norm=head model.moe.groups.text.num_experts=128 model.moe.groups.text.ffn_dim=768"
)
QWEN235 = (
    "model.hidden_dim=4096 model.num_layers=94 model.num_heads=64 model.num_kv_heads=4 model.head_dim=128 "
    "model.vocab_size=151936 model.qk_norm=head model.moe.groups.text.num_experts=128 model.moe.groups.text.ffn_dim=1536"
)
OSS = (
    "model.hidden_dim=2880 model.num_layers=36 model.num_heads=64 model.num_kv_heads=8 model.head_dim=64 "
    "model.qk_norm=none model.vocab_size=201088 model.moe.groups.text.num_experts=128 model.moe.groups.text.ffn_dim=2880 "
    "model.moe.groups.text.top_k=4"
)
DEEPSEEK = (
    "model.hidden_dim=7168 model.num_layers=61 model.num_heads=128 model.num_kv_heads=128 model.head_dim=192 "
    "model.vocab_size=129280 model.qk_norm=none model.rope_dim=64 model.moe.first=3 model.dense_ffn_dim=18432 "
    "model.attention.kind=latent model.attention.q_rank=1536 model.attention.kv_rank=512 model.attention.value_dim=128 "
    "model.moe.shared_ffn_dim=2048 "
    "model.moe.groups.text.num_experts=256 model.moe.groups.text.ffn_dim=2048"
)
MODELS = {"Qwen3-30B-A3B": QWEN30, "Qwen3-235B-A22B": QWEN235, "GPT-OSS-120B": OSS, "DeepSeek-V3": DEEPSEEK}
ROWS = (
    Row("GPT-OSS-120B", BRIDGE, "gb200", 64, 64, 1280, 1, 8192, 15876, 72, 1e11, ""),
    Row("GPT-OSS-120B", BRIDGE, "b200", 64, 8, 512, 4, 4096, 8213, 8, 45e9, ""),
    Row("GPT-OSS-120B", BRIDGE, "h100", 64, 8, 512, 4, 4096, 5630, 8, 45e9, "PP 4 there"),
    Row("Qwen3-30B-A3B", BRIDGE, "h100", 16, 8, 512, 2, 4096, 5275, 8, 45e9, "PP 2 and FP8 there"),
    Row("Qwen3-30B-A3B", BRIDGE, "gb200", 8, 8, 512, 4, 4096, 23766, 72, 1e11, "MXFP8 there"),
    Row("Qwen3-30B-A3B", NOUS, "b200", 8, 8, 64, 1, 4096, 14796, 8, 45e9, "batch unknown"),
    Row("Qwen3-235B-A22B", BRIDGE, "gb200", 256, 32, 8192, 1, 4096, 4916, 72, 1e11, "PP 8 there"),
    Row("DeepSeek-V3", BRIDGE, "gb200", 256, 64, 4096, 1, 4096, 3139, 72, 1e11, "PP 4 there"),
    Row("DeepSeek-V3", "Megatron Bridge 25.09", "h100", 1024, 64, 8192, 1, 4096, 1297, 8, 45e9, "TP 2, PP 8, FP8 there"),
    Row("DeepSeek-V3", "DeepSeek-V3 report", "h800", 2048, 64, 15360, 1, 4096, 1544, 8, 45e9, "PP 16, FP8 there"),
)


def tokens_per_second(row: Row) -> tuple[float, float]:
    """Returns the predicted tokens/s of a GPU, and the fraction of a step in communication that is not overlapped."""
    batch = row.batch // (row.gpus * row.micro) * row.gpus * row.micro or row.gpus * row.micro
    overrides = [
        *MODELS[row.model].split(" "),
        f"model.max_seq_len={row.seq_len}",
        f"data.seq_len={row.seq_len}",
        f"train.global_batch={batch}",
        f"train.micro_batch={row.micro}",
        f"parallel.ep={row.ep}",
        f"parallel.edp={row.gpus // row.ep}",
        "parallel.two_batch_overlap=false",  # the planner cannot time two-batch overlap
    ]
    config = load_config("olmoe_1b7b_8gpu", overrides)
    peak = peak_tflops(row.card)
    assert peak is not None
    rates = published_rates(row.card, 1e12 * peak, ranks_per_node=row.node, between=row.between)
    placement = make_placement(config.placement, expert_groups(config.model.moe), num_ranks=row.ep, token_mix={})
    found = LayoutEstimator(rates, Expected({}), {}, 1e15).estimate(config, placement)
    return found.tokens_per_second / row.gpus, (found.exchange + found.tail) / found.seconds


def main() -> None:
    table = Table("model", "source", "GPUs", "EP", "measured", "predicted", "predicted / measured", "not covered", "note")
    for row in ROWS:
        predicted, shown = tokens_per_second(row)
        numbers = (f"{row.measured:,.0f}", f"{predicted:,.0f}", f"{predicted / row.measured:.2f}", f"{shown:.0%}")
        table.add_row(row.model, row.source, f"{row.gpus} {row.card}", str(row.ep), *numbers, row.note)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
