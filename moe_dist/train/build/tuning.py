"""Makes the objects of router tuning from the section `router_tuning`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from moe_dist.config.schema import Config
from moe_dist.config.tuning_schema import RouterTuningSection
from moe_dist.formats.manifest import Manifest
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.train.router_tuning.loader import SampleMaker
from moe_dist.train.router_tuning.neighbours import NeighbourIndex, Neighbours
from moe_dist.train.router_tuning.samples import Samples
from moe_dist.train.router_tuning.tuning import Chosen, RouterTuning, RoutingReader

NO_TASK_GRADIENT = "router tuning: with top_k=1 and normalised weights only the regulariser trains routers, not the loss"


def build_tuning(config: Config, manifest: Manifest, parallel: ParallelModel, groups: Sequence[int]) -> RouterTuning | None:
    """Returns the router tuning of a run, or None if the configuration has no section `router_tuning`. `groups` has the
    index of the expert group of each modality."""
    section, mesh = config.router_tuning, parallel.mesh
    if section is None:
        return None
    if mesh.rank == 0 and config.model.no_task_gradient:
        print(NO_TASK_GRADIENT)
    samples, layers = Samples(section.data), section.chosen_layers(config.model.moe_layers)
    stored = samples.manifest.layers
    chosen = Chosen(
        layers,
        places=tuple(config.model.moe_layers.index(layer) for layer in layers),
        stored=tuple(stored.index(layer) for layer in layers if layer in stored),  # the other layers need a refresh
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
    """Returns the function that finds the neighbours of a sample. With the regulariser `l2` each sample is its own only
    neighbour, so the target is the sample's routing before the first step."""
    if section.regulariser == "l2" or not section.weight:
        return lambda number: Neighbours(np.array([number]), np.ones(1))
    return NeighbourIndex(
        samples.embeddings_SE,
        samples.manifest.right if section.filter_by_success else len(samples),
        bandwidth=section.bandwidth,
        random_seed=seed if section.random_neighbours else None,
        **section.neighbours.model_dump(exclude={"kind"}),
    )
