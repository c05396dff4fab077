"""Compares moe_dist with other implementations on this machine's GPUs, with the options of `moe-dist gpu-check`:
python -m research.gpu_rivals --json rivals.json [--gpus N] [--minutes 9] [--rehearse]"""

from collections.abc import Mapping

from moe_dist.runtime.command_line import reports_errors, run_command, takes
from tools.gpu_check.__main__ import GpuCheckOptions, take_checks
from tools.gpu_check.session import Check

RIVALS: Mapping[str, Check] = {
    "rivals": Check("research.gpu_rivals.layers:rivals", 60, "time of a layer over those of plain layers of torch"),
    "layer": Check("research.gpu_rivals.layers:megatron_layer", 120, "time of a layer over Megatron-Core's"),
    "step": Check("research.gpu_rivals.megatron_step:megatron_step", 120, "time of a step over Megatron-Core's"),
}


@reports_errors("gpu-rivals")
@takes(GpuCheckOptions)
def main(options: GpuCheckOptions) -> None:
    """Compare moe_dist's layer and step with other implementations on GPUs."""
    take_checks(RIVALS, options)


if __name__ == "__main__":
    run_command(main)
