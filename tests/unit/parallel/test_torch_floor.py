"""torch 2.11, the oldest that setup.py allows, works without `ShardPlacementResult`, which shards experts over edp
ranks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import DTensor

from docs.import_graph import read_sources
from moe_dist.comm.collectives import CommStats
from moe_dist.errors import ConfigError
from moe_dist.parallel.mesh import destroy_world, make_mesh, pretend_world
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.parameter_names import Role
from tests.support.layouts import Layout, build

ROOT = Path(__file__).parents[3]
# Modules import these private names of torch when they are loaded. `make torch-floor` checks that torch 2.11 has all of
# them.
IMPORTED = {
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
}
LAZY = {
    "torch.cuda._sanitizer.CUDASanitizerDispatchMode",  # only gpu-check imports this
    "torch.distributed.fsdp._fully_shard._fsdp_common.FSDPMeshInfo",
    "torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult",  # torch 2.11 lacks it
    "torch.testing._internal.distributed.fake_pg.FakeStore",
}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Makes this process rank 0 of a world whose collectives do nothing."""
    pretend_world(rank=0, world_size=2)
    yield
    destroy_world()


def built(layout: Layout) -> ParallelModel:
    return build(layout, make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0), CommStats())


@pytest.mark.usefixtures("two_ranks")
def test_without_other_holders_experts_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_fsdp_common, "ShardPlacementResult", raising=False)  # torch 2.11 lacks it
    parallel = built(Layout(2, 1, data="fsdp2"))
    sharded = {each.role: isinstance(each.parameter, DTensor) for each in parallel.parameters}
    assert not sharded[Role.EXPERT]
    assert sharded[Role.DENSE]
    assert all(parallel.replicas(each) == 1 for each in parallel.parameters if each.role is Role.EXPERT)


@pytest.mark.usefixtures("two_ranks")
def test_experts_of_several_holders_need_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_fsdp_common, "ShardPlacementResult", raising=False)
    with pytest.raises(ConfigError, match=r"parallel\.edp=2: torch .* install torch>=2\.12"):
        built(Layout(1, 2, data="fsdp2"))


@pytest.mark.slow
def test_no_other_private_name_is_imported_at_the_start() -> None:
    files = [each for each in read_sources(ROOT) if not each.path.startswith(("docs", "tests"))]
    private = {
        each.name
        for file in files
        for each in file.imports
        if each.name.startswith("torch.") and any(part.startswith("_") for part in each.name.split("."))
    }
    assert private == IMPORTED | LAZY
