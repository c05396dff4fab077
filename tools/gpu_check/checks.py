"""Lists all checks in the order in which they run: checks of results first, then measurements of speed."""

from collections.abc import Mapping

from tools.gpu_check.session import Check

CHECKS: Mapping[str, Check] = {
    "modules": Check("tools.gpu_check.machine:modules", 90, "every module imports; the presets for GPUs build"),
    "kernels": Check("tools.gpu_check.kernels:kernels", 120, "Triton kernels = torch in float64, values and gradients"),
    "attention": Check("tools.gpu_check.layers:attention", 240, "attention inside documents = dense masks in float64"),
    "layer": Check("tools.gpu_check.layers:layer", 90, "MoE layer on the GPU = on the CPU in float64"),
    "races": Check("tools.gpu_check.races:races", 180, "no operation touches rows that an exchange has in flight"),
    "dispatch": Check("tools.gpu_check.layers:dispatch", 150, "layer on N ranks = on one rank of the CPU, in float64"),
    "DeepEP": Check("tools.gpu_check.gpus:deep_ep", 120, "layer over DeepEP V2 = in float64"),
    "HybridEP": Check("tools.gpu_check.gpus:hybrid_ep", 120, "layer over HybridEP = in float64"),
    "steps": Check("tools.gpu_check.training:steps", 240, "training steps, DDP and FSDP2, fp32 and bf16 = fp32 on the CPU"),
    "repeat": Check("tools.gpu_check.training:repeat", 180, "a run repeats bit for bit, also across a checkpoint"),
    "long run": Check("tools.gpu_check.training:long_run", 120, "100 steps learn, and hold no more memory at their end"),
    "generation": Check("tools.gpu_check.training:generation", 60, "generated tokens = those of the CPU"),
    "syncs": Check("tools.gpu_check.layers:syncs", 60, "host syncs of an MoE layer and of a step"),
    "ceilings": Check("tools.gpu_check.rates:ceilings", 60, "rates of copies and matrix products; launches"),
    "power": Check("tools.gpu_check.machine:power", 30, "NVML reads power, load and memory"),
    "layer rate": Check("tools.gpu_check.rates:layer_rate", 120, "time of layers over their least time"),
    "exchanges": Check("tools.gpu_check.gpus:exchanges", 120, "rate of exchanges between GPUs, and what hides them"),
    "contexts": Check("tools.gpu_check.gpus:contexts", 60, "no rank has a context on another's GPU"),
    "preset": Check("tools.gpu_check.training:preset", 240, "tokens/s, MFU and memory of OLMoE, cut to fit"),
}
