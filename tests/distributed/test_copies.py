"""A bit that differs between copies of a weight, moment or buffer is found, with its name and its rank."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.checkpoint.copies import unequal_copies
from moe_dist.errors import IntegrityError
from moe_dist.optim.optimizer import local
from moe_dist.train.build.training import rank_layout
from moe_dist.train.start.resume import Progress
from tests.support.cover import full
from tests.support.engine_run import megatron, ranks, started_run, take_steps
from tests.support.worlds import RankContext

BIASES = {"model.moe.router.selection_bias": True, "model.moe.balance": [{"kind": "loss_free", "rate": 0.1}]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (3, {**ranks(1, 3), "train.global_batch": 6, **BIASES}),
    "ddp, ep": (4, ranks(2, 2)),
    "fsdp2, ep": (4, {**ranks(2, 2), "parallel.data": "fsdp2"}),
    "ep, replicas": (4, {**ranks(4), "rank_balance": {"replicating": {"every": 2, "slots": 4, "flops_per_byte": 1e-3}}}),
    "megatron, tp, pp": (4, {**ranks(1, 4), **megatron(tp=2, pp=2)}),
    "megatron, tp, ep": (4, {**ranks(2, 2), **megatron(tp=2)}),
}


def flip_bit(tensor: Tensor) -> None:
    local(tensor).view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])[-1] ^= 1


def flipped(rank: RankContext, data: str, changes: Mapping[str, Any]) -> list[tuple[str, int, list[str], list[int]]]:
    """For each kind of tensor that has copies, flips a bit of one tensor on the last rank, compares, and flips the bit
    back. Returns for each kind the tensor's name, its number of copies, and the differences that are found."""
    with started_run(rank, data, changes) as run:
        take_steps(run, 0, 2)
        state = run.training.capture(rank_layout(run.placement, run.mesh))
        assert unequal_copies(state, run.mesh.world, run.mesh.device) == ([], [])
        held = {name: each for name, each in state.held.items() if each.copies > 1}
        kinds = {(name.startswith("optimizer"), name.split(".")[-1]): (name, each.copies) for name, each in held.items()}
        box = [[*kinds.values()]]
        dist.broadcast_object_list(box, src=rank.world_size - 1)
        found = []
        for name, copies in box[0]:
            for _ in range(2):
                if rank.rank == rank.world_size - 1:
                    flip_bit(held[name].tensor)
                found.append((name, copies, *unequal_copies(state, run.mesh.world, run.mesh.device)))
        return found


@pytest.mark.parametrize(
    "layout",
    ["ddp", "fsdp2, ep", full("ddp, ep"), full("ep, replicas"), full("megatron, tp, pp"), full("megatron, tp, ep")],
)
def test_one_bit_is_found(run_in_world: Callable[..., list[Any]], tiny_data: Path, layout: str) -> None:
    """Among three or more copies, the one that differs is blamed. Of two copies, both are blamed."""
    world, changes = LAYOUTS[layout]
    results = run_in_world(world, flipped, str(tiny_data), changes)
    assert all(each == results[0] for each in results)
    names = set()
    for (name, copies, found, blamed), (*_, again, nobody) in zip(results[0][::2], results[0][1::2], strict=True):
        assert again == nobody == []
        assert found == [name]
        assert world - 1 in blamed
        assert len(blamed) == (1 if copies > 2 else 2)
        names.add(name)
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in names)
    if layout == "ddp":
        assert any(".router." in name and name.endswith(".bias") for name in names)
        assert any(".experts." in name for name in names)


def sharded(rank: RankContext, data: str) -> int:
    """Returns how often a comparison reads the state of a run whose ranks have no copies."""
    with started_run(rank, data, {**ranks(1, 2), **megatron(distributed_optimizer=True)}) as run:
        take_steps(run, 0, 1)
        with mock.patch.object(type(run.training), "capture") as capture:
            run.saver().compare_copies(Progress(step=1))
        return capture.call_count


@pytest.mark.full
def test_a_distributed_optimizer_is_not_gathered_in_vain(run_in_world: Callable[..., list[Any]], tiny_data: Path) -> None:
    assert run_in_world(2, sharded, str(tiny_data)) == [0, 0]


def drifting(rank: RankContext, data: str, root: str) -> tuple[str, bool, str]:
    """Flips a bit of a weight on rank 1 in step 5 of a run that saves after every third step. Returns the error, and the
    newest checkpoint."""
    changes = {**ranks(1, 3), "train.steps": 12, "train.global_batch": 6, "checkpoint.every": 3, "run.root": root}
    with started_run(rank, data, {**changes, "monitor.compare_copies_every": 4}) as run:
        saver = run.saver()
        trainer = run.trainer(saver)
        take_step = trainer.take_step

        def step(*args: Any, number: int, **options: Any) -> Any:
            result = take_step(*args, number=number, **options)
            if number == 4 and rank.rank == 1:
                flip_bit(next(run.parameters()).detach())
            return result

        trainer.take_step = step  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(IntegrityError) as raised:
            trainer.fit()
        saver.writer.wait()
        return str(raised.value), raised.value.consequence, str(saver.newest)


def test_a_run_whose_copies_differ_ends_before_it_saves_them(
    run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path: Path
) -> None:
    """Copies are compared before the save of step 6, although the next regular comparison would be after step 8."""
    for rank, (error, consequence, newest) in enumerate(run_in_world(3, drifting, str(tiny_data), str(tmp_path))):
        assert "after step 6 the copies of embedding" in error
        assert "differ on rank 1," in error
        assert newest.endswith("step_3")
        assert newest in error
        assert consequence == (rank != 1)
