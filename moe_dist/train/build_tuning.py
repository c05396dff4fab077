"""Turns the section `router_tuning` into objects, for `build`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_dist.config.manifest import Manifest
from moe_dist.config.schema import Config
from moe_dist.config.tuning_schema import RouterTuningSection
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.train.router_tuning.loader import SampleLoader, SampleMaker
from moe_dist.train.router_tuning.neighbours import NeighbourIndex, Neighbours
from moe_dist.train.router_tuning.reading import RoutingReader
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.savings import savings
from moe_dist.train.router_tuning.tuning import Chosen, RouterTuning


def build_tuning(config: Config, manifest: Manifest, parallel: ParallelModel, groups: Sequence[int]) -> RouterTuning:
    """Router tuning of a model on its mesh; `groups` has the expert group of each modality."""
    section, mesh = config.router_tuning, parallel.mesh
    assert section is not None, "called where there is one"
    if mesh.rank == 0:
        print(f"router tuning, on each rank like this one: {savings(parallel)}")
        if config.model.moe.no_task_gradient:
            print("router tuning: with top_k=1 and normalised weights cross entropy moves no router, the regulariser alone")
    samples, layers = Samples(section.data), section.chosen_layers(config.model.moe_layers)
    stored = samples.manifest.layers
    chosen = Chosen(
        layers,
        places=tuple(config.model.moe_layers.index(layer) for layer in layers),
        stored=tuple(stored.index(layer) for layer in layers if layer in stored),  # all, if they are read
    )
    reader = RoutingReader(
        parallel.model,
        SampleMaker(manifest),
        group_of_modality=torch.tensor(groups, device=mesh.device),
        places=chosen.places,
        world=mesh.world,
        rank=mesh.rank,
        world_size=mesh.world_size,
        tracker=mesh.tracker,
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
    """Returns the function that finds the neighbours of a sample; with l2 the sample is its own neighbour, before the first
    step."""
    if section.regulariser == "l2" or not section.weight:
        return lambda number: Neighbours(np.array([number]), np.ones(1))
    return NeighbourIndex(
        samples.embeddings_SE,
        samples.manifest.right if section.filter_by_success else len(samples),
        bandwidth=section.bandwidth,
        random_seed=seed if section.random_neighbours else None,
        **section.neighbours.model_dump(exclude={"kind"}),
    )


def build_sample_loader(config: Config, manifest: Manifest, *, rank: int, world_size: int) -> SampleLoader:
    """A rank's training batches of samples."""
    assert config.router_tuning is not None, "called where there is one"
    return SampleLoader(
        Samples(config.router_tuning.data),
        manifest,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=rank,
        world_size=world_size,
    )
