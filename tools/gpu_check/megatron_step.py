"""Compares training steps of the small model with our MoE layers and with Megatron-Core's dispatcher and experts, in fp32.
Attention, router, loss, sums of gradients and optimizer are the same in both steps."""

from contextlib import nullcontext
from typing import Any

import torch

from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.objective.loss import AuxSettings
from tools.bench.layers import LEARNING_RATE, random_batches, training_step
from tools.bench.megatron_core import Variant
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.rates import seconds_of
from tools.gpu_check.training import MODES, MOST, configure, losses_and_norms

TIMES = 5  # number of timed steps, equal on all ranks


def megatron_step(job: CheckJob) -> list[Reading]:
    """Measures the largest relative difference of the first step's loss and gradient norm, and the ratio of the steps'
    times."""
    found = on_ranks(_steps, job)[0]
    return [
        Reading("difference of loss and gradient norm", found["apart"], most=10 * MOST["fp32"]),
        job.timed("ours / Megatron-Core's sequential experts", found["ours"] / found["theirs"], most=1.0),
    ]


def _steps(job: CheckJob, mesh: Mesh) -> dict[str, float]:
    config = configure(job, mesh, [*MODES["DDP, fp32"], "model.moe.router.normalise=true_chosen"])
    batches, aux = random_batches(config, mesh, seed=0), AuxSettings(kind="vanilla", balance=0.0, z=1e-3)
    try:
        with megatron_on_cpu() if job.rehearse else nullcontext(), model_parallel(ep=mesh.ep_size):
            results: list[Any] = []
            seconds = []
            for variant in (None, Variant()):
                step = training_step(config, mesh, variant)
                results.append(losses_and_norms([step(batches, lr=LEARNING_RATE, aux=aux)]))
                seconds.append(seconds_of(job, lambda step=step: step(batches, lr=LEARNING_RATE, aux=aux), times=TIMES))
    except ImportError as error:
        raise NotPossibleError(f"megatron-core is not installed: {error}") from error
    ours, theirs = torch.tensor(results)
    return {"apart": float((ours / theirs - 1).abs().max()), "ours": seconds[0], "theirs": seconds[1]}
