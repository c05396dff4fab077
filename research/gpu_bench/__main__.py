"""Measures kernels on this machine's GPUs, and compares moe_dist with other implementations, with the options of
`moe-dist gpu-check`: python -m research.gpu_bench --json gpu_bench.json [--gpus N] [--minutes 9] [--rehearse]"""

from collections.abc import Mapping

from moe_dist.runtime.command_line import reports_errors, run_command, takes
from tools.gpu_check.__main__ import GpuCheckOptions, take_checks
from tools.gpu_check.session import Check

MEASUREMENTS: Mapping[str, Check] = {
    "ceilings": Check("research.gpu_bench.ceilings:ceilings", 60, "rates of copies and matrix products; launches"),
    "power": Check("research.gpu_bench.cards:power", 30, "NVML reads power, load and memory"),
    "contexts": Check("research.gpu_bench.cards:contexts", 60, "no rank has a context on another's GPU"),
    "long run": Check("research.gpu_bench.cards:long_run", 120, "100 steps learn, and hold no more memory at their end"),
    "syncs": Check("research.gpu_bench.steps:syncs", 60, "host syncs of an MoE layer and of a step"),
    "exchanges": Check("research.gpu_bench.steps:exchanges", 120, "rate of exchanges between GPUs, and what hides them"),
    "preset": Check("research.gpu_bench.steps:preset", 240, "tokens/s, MFU and memory of OLMoE, cut to fit"),
    "sanitizer": Check("research.gpu_bench.sanitizer:sanitizer", 180, "no kernel reads or writes outside its tensors"),
    "workloads": Check("research.gpu_bench.workloads:workloads", 150, "W0 to W7, from balanced to bursts = in float64"),
    "graph": Check("research.gpu_bench.graph:graph", 90, "an MoE layer in a CUDA graph = with sizes read on the host"),
    "layer rate": Check("research.gpu_bench.rates:layer_rate", 120, "time of layers over their least time"),
    "kernel rates": Check("research.gpu_bench.rates:kernel_rates", 60, "time of each kernel over bytes / copy rate"),
    "grouped product": Check("research.gpu_bench.rates:grouped", 60, "grouped product over the dense rate"),
    "null fraction": Check("research.gpu_bench.rates:null_fraction", 60, "time of a layer as choices become null"),
    "attention rate": Check("research.gpu_bench.rates:attention_rate", 120, "attention inside documents over causal"),
    "rivals": Check("research.gpu_bench.layers:rivals", 60, "time of a layer over those of plain layers of torch"),
    "layer": Check("research.gpu_bench.layers:megatron_layer", 120, "time of a layer over Megatron-Core's"),
    "step": Check("research.gpu_bench.megatron_step:megatron_step", 120, "time of a step over Megatron-Core's"),
}


@reports_errors("gpu-bench")
@takes(GpuCheckOptions)
def main(options: GpuCheckOptions) -> None:
    """Measure kernels and compare layers and steps with other implementations on GPUs."""
    take_checks(MEASUREMENTS, options)


if __name__ == "__main__":
    run_command(main)
