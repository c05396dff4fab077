"""Tunes routers on any layout of ranks: two optimizer steps of the float64 model of `layouts` on made-up samples."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from moe_dist.formats.manifest import Manifest
from moe_dist.placement.parameter_names import named_parameters
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.router_tuning.loader import MAKERS, SampleLoader, SampleMaker
from moe_dist.train.router_tuning.neighbours import NeighbourIndex
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.tuning import Chosen, RouterTuning, RoutingReader
from moe_dist.train.step.result import StepResult
from tests.support.layouts import IMAGE, STEPS, TEXT, Layout, TrainingRank
from tests.support.whole_tensors import carry
from tests.support.worlds import RankContext

MANIFEST = Manifest.model_construct(modalities={"text": (TEXT,), "image": (IMAGE,)}, pad_id=0)
BATCH, MICRO_BATCHES = 16, 2  # samples per step, and micro-batches per rank


@dataclass(frozen=True)
class Tuned:
    """The results of one rank.

    Attributes:
        before, parameters: Parameters by logical name.
        gradients: Gradients of the first step by name, without parameters that have no gradient.
        moments: Names of the parameters with moments.
        events: Events of the exchanges.
    """

    steps: list[StepResult]
    before: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    moments: set[str]
    events: list[str]


def tune(
    rank: RankContext,
    layout: Layout,
    folder: Path,
    checkpoint: Path,
    refresh_every: int | None = None,
    objective: str = "tokens",
) -> Tuned:
    """Tunes the routers of the layers in `layout.tuned`. Returns this rank's results."""
    training = TrainingRank(layout)
    mesh, parallel, optimizer = training.mesh, training.parallel, training.optimizer
    carry(checkpoint, parallel, optimizer, training.placement, mesh)
    samples = Samples(folder)
    reader = RoutingReader(
        parallel.model,
        SampleMaker(MANIFEST),
        group_of_modality=torch.tensor([0, 1]),
        places=layout.tuned,
        mesh=mesh,
        batch_tokens=16,
    )
    tuning = RouterTuning(
        samples,
        parallel.model,
        Chosen(layout.tuned, layout.tuned, layout.tuned),
        reader,
        neighbours=NeighbourIndex(samples.embeddings_SE, samples.manifest.right, bandwidth=1.0, k=3),
        weight=2.0 / BATCH,
        refresh_every=refresh_every,
    )
    training.step.tuning = tuning
    loader = SampleLoader(
        samples,
        MAKERS[objective](MANIFEST),
        seed=0,
        global_batch=BATCH,
        micro_batch=BATCH // MICRO_BATCHES // mesh.world_size,
        rank=mesh.rank,
        world_size=mesh.world_size,
    )
    gradients: dict[str, np.ndarray] = {}

    def keep_gradients(*_: object) -> None:
        if not gradients:
            found = {info.name: info.parameter.grad for info in parallel.parameters}
            gradients.update({name: _whole(each) for name, each in found.items() if each is not None})

    optimizer.register_step_pre_hook(keep_gradients)
    before = training.logical()
    aux = AuxSettings(kind="null_averaged", balance=0.0, z=0.0)
    results = [training.step(loader.batches(number * BATCH), lr=1e-2, aux=aux, number=number) for number in range(STEPS)]
    named = {parameter: name for _, name, _, parameter in named_parameters(parallel.model)}
    return Tuned(
        steps=results,
        before=before,
        parameters=training.logical(),
        gradients=gradients,
        moments={named[parameter] for parameter in optimizer.state},
        events=training.comm_stats.events or [],
    )


def _whole(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()
