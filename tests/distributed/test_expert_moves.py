"""Experts change ranks during training. Their weights and moments arrive bit-equal, and training continues.

The test makes three runs of two steps. In run 1 no expert moves. In run 2 experts move between the steps. Run 3 starts
with the new placement, from a checkpoint that run 2 saved after its move. Runs 2 and 3 are bit-equal. Run 1 differs from
them only by rounding, because each rank sums the outputs of its experts before it sends them. In float64 the difference
is below 1e-9.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.optim.optimizer import MOMENTS
from moe_dist.parallel.initialise import logical_expert_names
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.parameter_names import EXPERTS
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.train.build.dispatch import dispatch_context, dispatch_with
from moe_dist.train.build.training import build_optimizer
from moe_dist.train.objective.loss import AuxSettings
from moe_dist.train.rank_balance.expert_moves import move_experts, same_shapes
from moe_dist.train.step.training_step import TrainingStep
from tests.support.agreement import Arrays, merged
from tests.support.cover import exhaustive, full
from tests.support.layouts import HIDDEN_DIM, MICRO_BATCHES, SEQUENCES, Layout, batch_of, build, config_of, placement_for
from tests.support.whole_tensors import carry
from tests.support.worlds import RankContext

AUX = AuxSettings(kind="null_averaged", balance=0.02, z=1e-3)
LAYOUTS = [
    exhaustive(Layout(2, 1)),
    exhaustive(Layout(2, 1, "interleaved", "fsdp2", "block", overlap=True, chunks=2)),
    # edp 2 does not divide a stack of 3 experts, so FSDP2 shards inside each expert; it shards a stack of 2 by experts
    Layout(2, 2, "interleaved", "fsdp2"),
    exhaustive(Layout(4, 1, "uneven")),  # a rank without experts
    full(Layout(4, 1, "uneven", "fsdp2", "block", ranks_per_node=2)),
    exhaustive(Layout(2, 2, optimizer="muon")),
    full(Layout(2, 1, ffn_lora="each")),
    full(Layout(2, 2, "interleaved", "fsdp2", fsdp_gather="step", chunks=2)),
]


class Run:
    """A model in training under a layout, with its optimizer."""

    def __init__(self, rank: RankContext, layout: Layout, mesh: Mesh, placement: ExpertPlacement) -> None:
        self.rank, self.layout, self.mesh, self.placement = rank, layout, mesh, placement
        self.comm_stats = CommStats()
        self.parallel = build(layout, mesh, self.comm_stats, placement)
        self.optimizer = build_optimizer(config_of(layout), self.parallel.model)
        self.training_step = TrainingStep(
            self.parallel,
            self.optimizer,
            placement=placement,
            group_of_modality=[0, 1],
            clip_norm=0.5,
            comm_stats=self.comm_stats,
        )

    def step(self, number: int) -> None:
        each = SEQUENCES // self.rank.world_size
        batches = [batch_of(number, micro, self.rank.rank * each, each) for micro in range(MICRO_BATCHES)]
        self.training_step(batches, lr=1e-2, aux=AUX, number=number)

    def move(self, placement: ExpertPlacement) -> None:
        move_experts(self.parallel, self.optimizer, self.placement, placement)
        section, nodes = config_of(self.layout).parallel, (self.mesh.inter_node, self.mesh.intra_node)
        wire = AllToAll(self.mesh.ep, self.comm_stats)
        context = dispatch_context(section, placement, wire, HIDDEN_DIM, nodes)
        dispatch_with(self.parallel.model, section.dispatch, context)
        self.placement = self.training_step.placement = placement

    def tensors(self) -> Arrays:
        """Returns the full weights and moments by logical name."""
        found: Arrays = {}
        for named in self.parallel.parameters:
            state = self.optimizer.state.get(named.parameter, {})
            tensors = {"": named.parameter.detach(), **{name: state[name] for name in MOMENTS if name in state}}
            for moment, tensor in tensors.items():
                if not tensor.shape[0]:
                    continue
                whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()
                names = [named.name]
                if named.role in EXPERTS:
                    names = logical_expert_names(named.name, self.placement, self.mesh.ep_rank)
                else:
                    whole = whole[None]
                found.update({f"{moment} {name}": each for name, each in zip(names, whole, strict=True)})
        return found


class Seen(NamedTuple):
    """Tensors on one rank: before and after the move in run 2, and at the end of each of the three runs."""

    before: Arrays
    after: Arrays
    plain: Arrays
    moved: Arrays
    resumed: Arrays


def rotated(placement: ExpertPlacement) -> ExpertPlacement:
    """Gives each expert the rank of the next expert of its group."""
    slots: list[list[int]] = [[] for _ in placement.slots]
    for group in placement.groups:
        for place, expert in enumerate(group.experts):
            slots[placement.rank_of_expert[group.experts[(place + 1) % len(group.experts)]]].append(expert)
    return ExpertPlacement(placement.groups, tuple(tuple(sorted(each)) for each in slots))


def three_runs(rank: RankContext, layout: Layout) -> Seen:
    mesh = make_mesh(ep=layout.ep, device=torch.device("cpu"), timeout=600.0, ranks_per_node=layout.ranks_per_node)
    start = placement_for(layout)
    plain, moved = (Run(rank, layout, mesh, start) for _ in range(2))
    resumed = Run(rank, layout, mesh, rotated(start))
    assert rotated(start) != start
    assert same_shapes(start, rotated(start))
    plain.step(0)
    plain.step(1)
    moved.step(0)
    before = moved.tensors()
    moved.move(rotated(start))
    after = moved.tensors()
    for run in (moved, resumed):  # `moved` saves the checkpoint, `resumed` loads it
        carry(rank.folder / "checkpoint", run.parallel, run.optimizer, run.placement, mesh)
        run.step(1)
    return Seen(before, after, plain.tensors(), moved.tensors(), resumed.tensors())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.slow
def test_moved_experts_train_on(run_in_world: Callable[..., list[Any]], layout: Layout) -> None:
    seen = run_in_world(layout.world_size, three_runs, layout)
    before, after, plain, moved, resumed = (merged([getattr(each, field) for each in seen]) for field in Seen._fields)
    assert any("exp_avg" in name and ".experts." in name for name in before)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(resumed, moved, rtol=0, atol=0)
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-9)
    assert before.keys() == plain.keys()
    assert all(f" layers.0.moe.experts.text.{expert}.gate" in before for expert in range(5))
    where = [sorted(name for name in each.before if ".experts." in name) for each in seen]
    assert where != [sorted(name for name in each.after if ".experts." in name) for each in seen]
