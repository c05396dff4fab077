"""Each layout loads the checkpoints of all layouts. If saving or loading fails on one rank, all ranks see the error.

`make test` saves checkpoints from four layouts and loads them in one layout. Initial weights depend only on the seed and
the logical name, and the code that draws them knows no checkpoints. A model loaded from the checkpoint of another layout
must therefore be bit-equal to a freshly initialised model.
"""

import functools
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_dist.checkpoint.index import read_index
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.state import CheckpointState, capture
from moe_dist.checkpoint.storage import take_snapshot
from moe_dist.comm.collectives import CommStats
from moe_dist.errors import MoeDistError
from moe_dist.optim.optimizer import MOMENTS, materialise_moments, set_step_count, step_count
from moe_dist.parallel.initialise import initialise
from moe_dist.parallel.mesh import make_mesh
from moe_dist.train.build.training import build_optimizer, rank_layout
from tests.support.cover import exhaustive, full
from tests.support.layouts import Layout, batch_of, build, config_of, placement_of
from tests.support.worlds import RankContext

STEPS_TAKEN = 41
LAYOUTS = [
    Layout(),
    Layout(2, 1, "pinned"),
    Layout(2, 1, "interleaved", "fsdp2"),
    Layout(1, 2),
    Layout(1, 2, data="fsdp2"),  # edp 2 divides neither 5 nor 3 experts, so FSDP2 shards the rows of each expert
    Layout(3, 1, "pinned"),
    Layout(3, 1, "uneven", "fsdp2"),
    Layout(4, 1, "uneven"),  # a rank without experts
    Layout(4, 1, "uneven", "fsdp2"),
    Layout(2, 2, "interleaved"),
    Layout(2, 2, "interleaved", "fsdp2"),  # FSDP2 shards some stacks by experts, and some inside experts
    Layout(2, 2, "pinned", "fsdp2"),
    Layout(1, 4, data="fsdp2"),  # 4 divides neither 5 and 3 experts nor 6 and 10 rows, so some ranks have no shard
]
COVER = [
    LAYOUTS[1],
    LAYOUTS[4],
    LAYOUTS[7],
    LAYOUTS[10],
]  # `make test` saves from these layouts and loads in READERS; `make test-full` saves from all layouts
READERS = [LAYOUTS[10]]  # the test of Muon's moments loads in LAYOUTS[0]


class Setup:
    """A model on this rank, initialised from a seed, with optimizer moments that are computed from its weights."""

    def __init__(self, rank: RankContext, layout: Layout, seed: int) -> None:
        self.layout, self.placement = layout, placement_of(layout.placement, layout.ep)
        self.mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
        self.parallel = build(layout, self.mesh, CommStats())
        self.fill(seed)

    def fill(self, seed: int) -> None:
        place = {"ep_rank": self.mesh.ep_rank, "device": self.mesh.device}
        initialise(self.parallel.model, self.placement, **place, seed=seed, std=0.3)
        self.optimizer = build_optimizer(config_of(self.layout), self.parallel.model)
        materialise_moments(self.optimizer)
        set_step_count(self.optimizer, seed)
        with torch.no_grad():
            for parameter, moments in self.optimizer.state.items():
                for factor, moment in enumerate(MOMENTS, start=2):
                    if moment in moments:
                        moments[moment].copy_(parameter).mul_(factor)

    def capture(self, **values: Any) -> CheckpointState:
        layout, own = rank_layout(self.placement, self.mesh), {"rank": self.mesh.rank, "state": [1, 2]}
        return capture(self.parallel.model, self.optimizer, layout, values=values, rank_values=own)

    def pieces(self) -> dict[str, torch.Tensor]:
        """Returns a copy of each local tensor, under the model's own parameter names."""
        named = {}
        for name, parameter in self.parallel.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            for kind, tensor in {"": parameter.detach(), **{m: state[m] for m in MOMENTS if m in state}}.items():
                named[f"{kind}/{name}"] = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
        return named


def manager(folder: Path, **settings: Any) -> CheckpointManager:
    settings = {"keep": 2, "lease_check": lambda: None, **settings}
    return CheckpointManager(folder, process_group=dist.group.WORLD, **settings)


class NothingPickled:
    """Fails if an object collective pickles, or if anything is unpickled from a file, in the `with` block on this rank."""

    collectives = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
    places = (*((dist, name) for name in collectives), (pickle, "load"), (pickle, "loads"), (torch, "load"))

    def __enter__(self) -> None:
        self.before = [getattr(owner, name) for owner, name in self.places]
        for owner, name in self.places:
            setattr(owner, name, self.refuse)

    def __exit__(self, *_: object) -> None:
        for (owner, name), value in zip(self.places, self.before, strict=True):
            setattr(owner, name, value)

    @staticmethod
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an object was pickled or unpickled")


def save_body(rank: RankContext, layout: Layout, folder: Path) -> int:
    setup = Setup(rank, layout, STEPS_TAKEN)
    batch = batch_of(0, 0, rank.rank, 1)
    with torch.no_grad():  # after a forward FSDP2 leaves the parameters of the root module gathered
        setup.parallel.model(batch.tokens_BS, batch.positions_BS, batch.documents_BS, batch.modality_BS)
    with NothingPickled():
        state = setup.capture(position=7)
        manager(folder).save(5, state)
    return take_snapshot(5, state).nbytes


def load_body(rank: RankContext, layout: Layout, folders: list[Path]) -> int:
    setup = Setup(rank, layout, STEPS_TAKEN)
    expected = setup.pieces()
    for folder in folders:
        setup.fill(seed=1)
        before = setup.pieces()
        with NothingPickled():
            checkpoints = manager(folder)
            latest = checkpoints.latest()
            assert latest == folder / "step_5"
            restored = checkpoints.load(latest, setup.capture())
        assert (restored.step, restored.values) == (5, {"position": 7})
        assert restored.rank_values in ({}, {"rank": rank.rank, "state": [1, 2]})
        assert step_count(setup.optimizer) == STEPS_TAKEN
        loaded = setup.pieces()
        assert loaded.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(loaded[name], value), f"{name} from {folder.name}"
        assert any(not torch.equal(before[name], value) for name, value in expected.items())
    return len(expected)


@pytest.fixture(scope="module")
def saved(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """Returns the checkpoint folder of a layout; the first call writes it."""
    root = tmp_path_factory.mktemp("checkpoints")
    totals = set()

    @functools.cache
    def save(layout: Layout) -> Path:
        sizes = run_in_world(layout.world_size, save_body, layout, root / str(layout))
        assert all(sizes), "some rank had nothing to write"
        totals.add(sum(sizes))
        assert len(totals) == 1, "some layout writes a tensor not exactly once"
        return root / str(layout)

    return save


@pytest.mark.parametrize(
    ("layout", "writers"),
    [
        *((layout, COVER) if layout in READERS else full(layout, COVER) for layout in COVER),
        *(full(layout, [each for each in LAYOUTS if each not in COVER]) for layout in COVER),
        *(exhaustive(layout, LAYOUTS) for layout in LAYOUTS if layout not in COVER),
    ],
    ids=lambda value: f"from {len(value)}" if isinstance(value, list) else str(value),
)
@pytest.mark.slow
def test_every_layout_loads_every_other(
    run_in_world: Callable[..., list[Any]], saved: Callable[[Layout], Path], layout: Layout, writers: list[Layout]
) -> None:
    run_in_world(layout.world_size, load_body, layout, list(map(saved, writers)))


class LostError(MoeDistError):
    """Replaces the error that a lost lease raises."""


def test_muons_moments_load_under_another_layout(run_in_world: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Muon keeps one moment per matrix, and FSDP2 shards some stacks by experts and others inside experts."""
    written, read = Layout(2, 2, "interleaved", "fsdp2", optimizer="muon"), Layout(2, 1, "pinned", optimizer="muon")
    run_in_world(4, save_body, written, tmp_path)
    names = read_index(tmp_path / "step_5").tensors
    assert "optimizer.exp_avg.layers.1.moe.experts.text.4.down" in names
    assert "optimizer.exp_avg_sq.layers.1.moe.experts.text.4.down" not in names
    assert all(run_in_world(2, load_body, read, [tmp_path]))


def kind_of_error(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


def failing_body(rank: RankContext, folder: Path) -> dict[str, Any]:
    """Makes one rank's save fail in several ways between two good saves. Returns the errors on this rank, and the step
    that `latest` then names."""
    setup = Setup(rank, Layout(2, 1, "pinned"), STEPS_TAKEN)
    state, told = setup.capture(), {}
    manager(folder).save(1, state)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
    told["write"] = kind_of_error(lambda: manager(folder).save(2, state))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told["write leaves"] = sorted(path.name for path in folder.iterdir())

    def lost() -> None:
        raise LostError("another attempt holds the lease")

    told["lease"] = kind_of_error(lambda: manager(folder, lease_check=lost).save(2, state))
    told["latest"] = str(manager(folder).latest())
    dist.barrier()

    file = folder / "step_1" / "shard_00001.safetensors"
    whole = file.read_bytes()
    dist.barrier()
    if rank.rank == 0:
        file.write_bytes(whole[:-1])
    dist.barrier()
    told["truncated"] = kind_of_error(lambda: manager(folder).load(folder / "step_1", state))
    dist.barrier()
    if rank.rank == 0:
        file.write_bytes(whole)
    dist.barrier()
    told["mended"] = kind_of_error(lambda: manager(folder).load(folder / "step_1", state))
    told["saved"] = kind_of_error(lambda: manager(folder).save(2, state))
    told["end"] = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return told


def test_a_failure_on_one_rank_is_told_to_all(run_in_world: Callable[..., list[Any]], tmp_path: Path) -> None:
    first, second = run_in_world(2, failing_body, tmp_path)
    assert (first["write"][0], second["write"][0]) == ("CheckpointError", "CheckpointError")
    assert "failed on ranks [1]" in first["write"][1]
    assert "cannot write on rank 1" in second["write"][1]
    assert first["write leaves"] == ["latest", "step_1"]
    assert (first["lease"][0], second["lease"][0]) == ("LostError", "MoeDistError")
    assert first["latest"] == second["latest"] == str(tmp_path / "step_1")
    assert (first["truncated"][0], second["truncated"][0]) == ("DamagedError", "DamagedError")
    assert "shard_00001.safetensors" in second["truncated"][1]
    assert first["mended"] == second["mended"] == first["saved"] == second["saved"] == ("none", "")
    assert first["end"] == ["latest", "step_1", "step_2"]
