"""Payload bytes of our layer in Megatron equal their closed form exactly, on each rank, for random routings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.cover import exhaustive, full
from tests.support.megatron_model import HIDDEN_DIM, TWO_GROUPS, Layout, transformer_config
from tests.support.megatron_run import megatron
from tests.support.worlds import RankContext

SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
ROW_BYTES = HIDDEN_DIM * 4


def rows_to(routing: Any, placement: Any) -> torch.Tensor:
    """Counts distinct (token, rank) pairs by rank, [ep], in a loop over the router's choices."""
    taken = routing.assignments.taken()
    pairs = {
        (token, placement.rank_of_expert[expert])
        for token, expert in zip(taken.token_N.tolist(), taken.expert_N.tolist(), strict=True)
    }
    return torch.tensor([sum(rank == each for _, rank in pairs) for each in range(placement.num_ranks)])


def modalities(seed: int, rank: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Returns ids [batch, sequence]: mixed with padding, of one modality, or only padding (every third rank and seed)."""
    if (seed + rank) % 3 == 0:
        return torch.full(size, -1)
    first, end = ((-1, 2), (0, 1), (1, 2))[seed % 3]
    return torch.randint(first, end, size, generator=generator)


def run_routings(rank: RankContext, layouts: list[Layout], seeds: range) -> list[int]:
    """Each seed draws token counts and a router. Returns the rows that this rank sent, by layout."""
    totals = []
    for layout in layouts:
        with megatron(layout) as state:
            from megatron.core.process_groups_config import ProcessGroupCollection

            from moe_dist.megatron.expert_layer import ExpertLayer

            config = transformer_config(layout)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            layer = ExpertLayer(config, layout.settings, pg_collection=groups, layer_number=2)
            routings: list[Any] = []
            layer.moe.router.register_forward_hook(lambda _m, _i, routing, keep=routings: keep.append(routing))
            ep_group = state.get_expert_model_parallel_group()
            total = 0
            for seed in seeds:
                total += one_routing(layer, routings, rank.rank, seed, ep_group, repeated=bool(layout.options))
            totals.append(total)
    return totals


def one_routing(layer: Any, routings: list[Any], rank: int, seed: int, ep_group: Any, *, repeated: bool) -> int:
    """Compares this rank's bytes of forward and backward with the closed form. Returns its sent rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.moe.router.parameters():  # equal on all ranks
            parameter.normal_(generator=generator)
    own = torch.Generator().manual_seed(1000 * seed + rank)
    length, batch = (int(torch.randint(1, end, (), generator=own)) for end in (7, 4))
    ids = modalities(seed, rank, (batch, length), own)
    h = torch.randn(length, batch, HIDDEN_DIM, generator=own).requires_grad_()
    routings.clear()
    layer.comm_stats.take()
    y, _ = layer(h, ids)
    forward = layer.comm_stats.payload_bytes
    y.backward(torch.randn(y.shape, generator=own))
    backward = layer.comm_stats.payload_bytes - forward

    to = rows_to(routings[0], layer.placement)
    everywhere = [torch.empty_like(to) for _ in range(ep_group.size())]
    dist.all_gather(everywhere, to, group=ep_group)
    me = ep_group.rank()
    sent = int(to.sum() - to[me])
    received = sum(int(each[me]) for source, each in enumerate(everywhere) if source != me)
    assert forward == (sent + received) * ROW_BYTES, seed
    assert backward == (sent + received + sent * repeated) * ROW_BYTES, seed
    if bool((ids < 0).all()):
        assert sent == 0
    return sent


def layouts_of(world_size: int) -> list[Layout]:
    layouts = [Layout(ep=world_size, aux=False), Layout(ep=world_size, options=SELECTIVE)]
    if world_size > 1:
        layouts += [Layout(ep=world_size, uneven=True), Layout(ep=world_size, uneven=True, options=SELECTIVE)]
    return layouts


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [full(4, range(12)), exhaustive(1, range(40)), exhaustive(2, range(40)), exhaustive(4, range(12, 40))],
    ids=str,
)
def test_bytes_equal_the_closed_form_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    """400 routings, with ranks of only padding, batches of one modality, and a rank without experts (of four)."""
    assert TWO_GROUPS["groups"]["text"]["num_null"] > 0
    layouts = layouts_of(world_size)
    if world_size == 4:
        assert any(() in layout.settings.place(4).slots for layout in layouts)
    totals = run_in_world(world_size, run_routings, layouts, seeds)
    for at, _ in enumerate(layouts):
        assert (sum(each[at] for each in totals) > 0) == (world_size > 1)
