"""Chooses the engine that computes the steps of a run, by `engine.kind`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from moe_dist.config.schema import Config
from moe_dist.formats.manifest import Manifest
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.training import Training, build_training

Build = Callable[[Config, Manifest, ExpertPlacement, Mesh], Training]


@contextmanager
def _own(_: Config) -> Iterator[Build]:
    yield build_training


@contextmanager
def _megatron(config: Config) -> Iterator[Build]:
    from moe_dist.train.build.megatron import build_megatron_training, megatron_world

    with megatron_world(config):
        yield build_megatron_training


ENGINES: dict[str, Callable[[Config], AbstractContextManager[Build]]] = {"moe_dist": _own, "megatron": _megatron}


def started_engine(config: Config) -> AbstractContextManager[Build]:
    """Starts the engine of a run for a `with` block. Call this function after the process groups are made. Yields the
    function that builds model, optimizer and training step."""
    return ENGINES[config.engine.kind](config)
