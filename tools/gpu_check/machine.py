"""Checks the machine's GPU, the imports of moe_dist's modules, and the presets."""

import importlib
import pkgutil

import torch
from torch.cuda import nccl

from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_config
from moe_dist.runtime.node.facts import nvml
from moe_dist.train.start.dry_run import estimate
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading

OURS = ("moe_dist", "launchers", "tools")
PRESETS = (
    "olmoe_1b7b_8gpu",
    "adamoe_mixtral8x7b_64gpu",
    "moma_1b4_4t4i_32gpu",
    "mole_llama3_8b_8gpu",
    "adamoe_moma_small_1gpu",
)


def card(job: CheckJob) -> list[Reading]:
    """Returns facts as readings. The first reading has the number of GPUs as `value`, and the name of the first GPU as
    `unit`. All other readings have the value 0, and a fact about the GPU or the software as `unit`."""
    if not torch.cuda.is_available():
        raise NotPossibleError(f"torch {torch.__version__} sees no GPU (built for CUDA {torch.version.cuda or 'none'})")
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "nccl": ".".join(map(str, nccl.version())),
        "driver": nvml()[1],
    }
    named = [Reading(name, 0.0, text) for name, text in facts.items()]
    return [Reading("GPUs", torch.cuda.device_count(), properties.name), *named]


def modules(job: CheckJob) -> list[Reading]:
    """Imports all modules of moe_dist. An import may fail only if an optional package is missing."""
    missing, failed, count = set[str](), list[str](), 0
    top = "moe_dist.optim" if job.rehearse else "moe_dist"  # importing all modules takes a core one minute
    for found in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
        if found.name.startswith(("moe_dist.bundled", "moe_dist.hf.served")):
            continue
        try:
            importlib.import_module(found.name)
            count += 1
        except ImportError as error:
            name = (error.name or "").partition(".")[0]
            if not isinstance(error, ModuleNotFoundError) or name in ("", *OURS):
                failed.append(f"{found.name}: {error}")
            missing.add(name)
    if failed:
        raise RuntimeError("; ".join(failed))
    presets = PRESETS[-1:] if job.rehearse else PRESETS
    for preset in presets:
        estimate(load_config(find_config(preset), []))
    lacking = f" (packages that are not here: {', '.join(sorted(missing))})" if missing else ""
    return [Reading(f"modules imported{lacking}", count, least=1), Reading("presets built", len(presets))]
