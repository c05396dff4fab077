"""Makes the objects of router tuning from the section `router_tuning`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from moe_dist.config.schema import Config
from moe_dist.config.tuning_schema import RouterTuningSection
from moe_dist.formats.manifest import Manifest
from moe_dist.optim.optimizer import MOMENTS
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.parameter_names import EXPERTS
from moe_dist.plan.memory import ITEMSIZE
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.neighbours import NeighbourIndex, Neighbours
from moe_dist.train.router_tuning.reading import RoutingReader
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.tuning import Chosen, RouterTuning


def build_tuning(config: Config, manifest: Manifest, parallel: ParallelModel, groups: Sequence[int]) -> RouterTuning:
    """Makes the router tuning of a model. `groups` has the index of each modality's expert group."""
    section, mesh = config.router_tuning, parallel.mesh
    assert section is not None, "the caller checks the section"
    if mesh.rank == 0:
        print(f"router tuning, on each rank like this one: {savings(parallel, ITEMSIZE[config.optimizer.moments])}")
        if config.model.moe.no_task_gradient:
            print("router tuning: with top_k=1 and normalised weights only the regulariser trains routers, not the loss")
    samples, layers = Samples(section.data), section.chosen_layers(config.model.moe_layers)
    stored = samples.manifest.layers
    chosen = Chosen(
        layers,
        places=tuple(config.model.moe_layers.index(layer) for layer in layers),
        stored=tuple(stored.index(layer) for layer in layers if layer in stored),  # others need a refresh
    )
    reader = RoutingReader(
        parallel.model,
        SampleMaker(manifest),
        group_of_modality=torch.tensor(groups, device=mesh.device),
        places=chosen.places,
        mesh=mesh,
    )
    return RouterTuning(
        samples,
        parallel.model,
        chosen,
        reader,
        neighbours=build_neighbours(section, samples, seed=config.run.seed),
        weight=section.weight / config.train.global_batch,
        refresh_every=section.refresh_every,
    )


def build_neighbours(section: RouterTuningSection, samples: Samples, *, seed: int) -> Callable[[int], Neighbours]:
    """Returns the function that finds the neighbours of a sample. With the regulariser `l2` a sample's only neighbour is
    the sample itself, and the target is its routing before the first step."""
    if section.regulariser == "l2" or not section.weight:
        return lambda number: Neighbours(np.array([number]), np.ones(1))
    return NeighbourIndex(
        samples.embeddings_SE,
        samples.manifest.right if section.filter_by_success else len(samples),
        bandwidth=section.bandwidth,
        random_seed=seed if section.random_neighbours else None,
        **section.neighbours.model_dump(exclude={"kind"}),
    )


class Savings(NamedTuple):
    """Counts on one rank: each field has first the count for the trained parameters, then the count for all parameters."""

    parameters: tuple[int, int]
    optimizer: tuple[int, int]  # bytes of AdamW's moments
    reduced: tuple[int, int]  # bytes of gradients that the data-parallel reduction of a step takes as input

    def __str__(self) -> str:
        parts = zip(("parameters", "bytes of optimizer state", "bytes of gradients to reduce a step"), self, strict=True)
        return ", ".join(f"{moving:,} of {every:,} {what}" for what, (moving, every) in parts)


def savings(parallel: ParallelModel, moment_bytes: int | None = None) -> Savings:
    """Counts parameters, optimizer state and reduced gradients on this rank, with router tuning and without it.
    `moment_bytes` is the size of a moment's element; None for the size of the parameter's element."""
    sums = [[0, 0], [0, 0], [0, 0]]
    for info in parallel.parameters:
        parameter, itemsize = info.parameter, info.parameter.element_size()
        here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        shared = parallel.mesh.edp_size if info.role in EXPERTS else parallel.mesh.world_size
        counts = (here, len(MOMENTS) * here * (moment_bytes or itemsize), parameter.numel() * itemsize if shared > 1 else 0)
        for total, count in zip(sums, counts, strict=True):
            total[0] += count * parameter.requires_grad
            total[1] += count
    return Savings(*((moving, every) for moving, every in sums))
