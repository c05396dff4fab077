"""Compares training steps of the small model in fp32, once with our MoE layers and once with Megatron-Core's dispatcher
and experts. Both steps have the same attention, router, loss, sums of gradients and optimizer."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from moe_dist.comm.collectives import CommStats
from moe_dist.config.schema import Config
from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.parallel.initialise import initialise
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.train.build.training import build_model
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step.training_step import TrainingStep
from research.gpu_bench.ceilings import seconds_of
from research.gpu_bench.megatron_core import MegatronMoE, Variant, copy_experts
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.training import MODES, MOST, configure, losses_and_norms

LEARNING_RATE = 1e-3
TIMES = 5  # number of timed steps; all ranks must take the same number


def megatron_step(job: CheckJob) -> list[Reading]:
    """Measures the largest difference between the two kinds of steps in the first loss and gradient norm. Also measures
    the ratio of their times."""
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


def random_batches(config: Config, mesh: Mesh, seed: int) -> list[Batch]:
    """Draws this rank's micro-batches of one step. Half of the documents are random text tokens, half are picture codes."""
    vocabulary = config.model.vocab_size
    boundary = vocabulary * 8 // 9
    maker = BatchMaker(seq_len=config.data.seq_len, pad_id=0, modalities=[[(0, boundary)], [(boundary, vocabulary)]])
    rng = np.random.default_rng([seed, mesh.rank])
    count, size = config.train.global_batch // mesh.world_size, config.train.micro_batch
    rows = []
    for number in range(count):
        low, high = (0, boundary) if number % 2 else (boundary, vocabulary)
        tokens = rng.integers(low, high, config.data.seq_len - 1)
        rows.append([Segment(tokens, np.zeros(len(tokens), bool), len(tokens))])
    return [maker.make(rows[at : at + size]) for at in range(0, count, size)]


def training_step(config: Config, mesh: Mesh, variant: Variant | None) -> TrainingStep:
    """Makes a training step of a new model. Its MoE layers are ours if `variant` is None, otherwise Megatron-Core's."""
    groups, comm_stats = expert_groups(config.model.moe), CommStats()
    placement = make_placement(config.placement, groups, num_ranks=mesh.ep_size, token_mix={})
    with torch.device("meta"):
        model = build_model(config, placement, ep_rank=mesh.ep_rank, ep_group=mesh.ep, comm_stats=comm_stats)
    initialise(model, placement, ep_rank=mesh.ep_rank, device=mesh.device, seed=0, std=config.model.init_std)
    if variant is not None:
        for layer in model.layers:
            moe: Any = layer.moe
            theirs = MegatronMoE(
                moe.norm, moe.router, placement, variant, hidden=config.model.hidden_dim, ep_rank=mesh.ep_rank
            )
            copy_experts(moe.experts, theirs.experts)
            layer.moe = theirs.to(mesh.device)
    parameters = split_parameters(model, weight_decay=0.1)
    optimizer = make_optimizer(parameters, backend="torch", lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    return TrainingStep(
        ParallelModel(model, mesh, "ddp"),
        optimizer,
        placement=placement,
        group_of_modality=[0, 1],
        clip_norm=1.0,
        comm_stats=comm_stats,
    )
