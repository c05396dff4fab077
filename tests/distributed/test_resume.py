"""A run resumes from a checkpoint with the same bits for 20 steps on its own layout, and within fp32 rounding on others."""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.checkpoint import manager as manager_module
from moe_dist.checkpoint.manager import CheckpointManager
from moe_dist.checkpoint.saver import CheckpointWriter
from moe_dist.checkpoint.state import RankLayout, capture
from moe_dist.comm.collectives import CommStats
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.parallel.mesh import make_mesh
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.step.training_step import TrainingStep
from tests.support.cover import exhaustive
from tests.support.layouts import MICRO_BATCHES, SEQUENCES, Layout, batch_of, build, placement_of
from tests.support.worlds import RankContext

SAVED_AT, LAST, BESIDE = 5, 26, 4
AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)
FP32 = "float32"
LAYOUTS = [
    Layout(1, 1, precision=FP32),
    Layout(2, 1, "pinned", precision=FP32),
    Layout(2, 1, "uneven", "fsdp2", precision=FP32),
    Layout(1, 2, data="fsdp2", precision=FP32),
    Layout(4, 1, "uneven", precision=FP32),
    Layout(2, 2, "interleaved", "fsdp2", precision=FP32),
]
COVER = [LAYOUTS[1], LAYOUTS[2]]  # `make test` reads and writes these
# tests/integration/test_local_launcher.py tests DDP as well.
SAME = [LAYOUTS[2], *(exhaustive(layout) for layout in LAYOUTS if layout is not LAYOUTS[2])]
Losses = list[tuple[float, ...]]
Undisturbed = Callable[[Layout], tuple[Path, Losses]]


class Resumed:
    """One rank of a training that saves during training, and may start from a checkpoint."""

    def __init__(self, rank: RankContext, layout: Layout, folder: Path) -> None:
        self.rank, mesh = rank, make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0)
        comm_stats = CommStats()
        self.parallel = build(layout, mesh, comm_stats)
        placement = placement_of(layout.placement, layout.ep)
        groups = split_parameters(self.parallel.model, weight_decay=0.1)
        self.optimizer = make_optimizer(groups, backend="torch", lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
        self.step = TrainingStep(
            self.parallel,
            self.optimizer,
            placement=placement,
            group_of_modality=[0, 1],
            clip_norm=0.5,
            comm_stats=comm_stats,
        )
        self.layout = RankLayout(placement, mesh.rank, mesh.world_size, mesh.ep_rank, mesh.edp_rank, mesh.edp_size)
        self.manager = CheckpointManager(folder, keep=2, lease_check=lambda: None, process_group=mesh.checkpoint)

    def state(self) -> Any:
        return capture(self.parallel.model, self.optimizer, self.layout)

    def train(self, first: int, last: int, after: Callable[[int], None] = lambda _: None) -> list[tuple[float, ...]]:
        """Returns the losses by modality and the gradient norm of each step."""
        each, seen = SEQUENCES // self.rank.world_size, []
        for number in range(first, last):
            batches = [batch_of(number, micro, self.rank.rank * each, each) for micro in range(MICRO_BATCHES)]
            result = self.step(batches, lr=1e-2, aux=AUX)
            seen.append((*result.nll_M.tolist(), result.grad_norm))
            after(number + 1)
        return seen


def undisturbed_body(rank: RankContext, layout: Layout, folder: Path) -> list[tuple[float, ...]]:
    run = Resumed(rank, layout, folder)
    saver = CheckpointWriter(run.manager, asynchronous=True)

    def after(step: int) -> None:
        saver.poll()
        if step == SAVED_AT:
            saver.write(step, run.state(), durable=False)

    seen = run.train(0, LAST, after)
    saver.wait()
    return seen


def resumed_body(rank: RankContext, layout: Layout, folder: Path, last: int) -> list[tuple[float, ...]]:
    run = Resumed(rank, layout, folder)
    newest = run.manager.latest()
    assert newest == folder / f"step_{SAVED_AT}"
    assert run.manager.load(newest, run.state()).step == SAVED_AT
    return run.train(SAVED_AT, last)


@pytest.fixture(scope="module")
def undisturbed(run_in_world: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Returns, for a layout, the folder of its checkpoint and the losses of its run; cached."""
    root = tmp_path_factory.mktemp("resume")

    @functools.cache
    def run(layout: Layout) -> tuple[Path, Losses]:
        results = run_in_world(layout.world_size, undisturbed_body, layout, root / str(layout))
        assert all(each == results[0] for each in results)
        return root / str(layout), results[0]

    return run


@pytest.mark.parametrize("layout", SAME, ids=str)
def test_the_same_layout_goes_on_to_the_same_bits(
    run_in_world: Callable[..., list[Any]], undisturbed: Undisturbed, layout: Layout
) -> None:
    folder, losses = undisturbed(layout)
    assert LAST - SAVED_AT >= 20
    resumed = run_in_world(layout.world_size, resumed_body, layout, folder, LAST)[0]
    assert resumed == losses[SAVED_AT:]


@pytest.mark.parametrize(
    ("layout", "writers"),
    [
        *((layout, COVER) for layout in COVER),
        *(exhaustive(layout, [each for each in LAYOUTS if layout not in COVER or each not in COVER]) for layout in LAYOUTS),
    ],
    ids=lambda value: f"from {len(value)}" if isinstance(value, list) else str(value),
)
def test_another_layout_goes_on_within_fp32_rounding(
    run_in_world: Callable[..., list[Any]], undisturbed: Undisturbed, layout: Layout, writers: list[Layout]
) -> None:
    for writer in writers:
        if writer == layout:
            continue
        folder, losses = undisturbed(writer)
        resumed = run_in_world(layout.world_size, resumed_body, layout, folder, SAVED_AT + BESIDE)[0]
        np.testing.assert_allclose(resumed, losses[SAVED_AT : SAVED_AT + BESIDE], rtol=2e-5, err_msg=f"from {writer}")


def in_flight_body(rank: RankContext, folder: Path) -> dict[str, Any]:
    """Delays rank 1's write while all ranks take steps. A second training saves the same step and waits for the save."""
    layout = Layout(2, 1, "pinned", precision=FP32)
    go, begun, real = threading.Event(), threading.Event(), manager_module.write_shard

    def held(*args: Any, **kwargs: Any) -> None:
        begun.set()
        if rank.rank == 1:
            assert go.wait(600)
        real(*args, **kwargs)

    twin = Resumed(rank, layout, folder / "twin")
    expected = twin.train(0, 3)
    twin.manager.save(3, twin.state())
    expected += twin.train(3, 6)
    run = Resumed(rank, layout, folder / "run")
    seen = run.train(0, 3)
    saver = CheckpointWriter(run.manager, asynchronous=True)
    manager_module.write_shard = held
    try:
        saver.write(3, run.state(), durable=False)
        assert begun.wait(600)
        seen += run.train(3, 6)  # training steps, while the collectives of the save wait for rank 1
        told = {"in flight": saver.in_flight, "committed": (folder / "run" / "step_3").exists()}
        go.set()
        saver.wait()
    finally:
        manager_module.write_shard = real
    return {**told, "same": seen == expected, "latest": str(run.manager.latest())}


def test_training_goes_on_while_a_save_is_in_flight(run_in_world: Callable[..., list[Any]], tmp_path: Path) -> None:
    from moe_dist.checkpoint.contents import open_checkpoint

    for told in run_in_world(2, in_flight_body, tmp_path):
        assert told == {"in flight": True, "committed": False, "same": True, "latest": str(tmp_path / "run" / "step_3")}
    ours, theirs = (open_checkpoint(tmp_path / name / "step_3").index.tensors for name in ("run", "twin"))
    assert ours == theirs
