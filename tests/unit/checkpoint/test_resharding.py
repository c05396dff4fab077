"""Every layout loads every other in one process: EP 1, 2, 3, 4 and 8, all placements, several data-parallel ranks.

Each fake rank builds its own part of the model, and no rows are sent. FSDP2's shards need real ranks: see
tests/distributed/test_checkpoint.py.
"""

from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint.state import CheckpointState, RankLayout, capture
from moe_dist.optim.optimizer import (
    MOMENTS,
    make_optimizer,
    materialise_moments,
    set_step_count,
    split_parameters,
    step_count,
)
from moe_dist.parallel.initialise import initialise
from moe_dist.train.build.training import build_model
from tests.support.cover import full
from tests.support.fake_ranks import load_all, save_all
from tests.support.layouts import Layout, config_of, placement_of
from tests.support.messages import refused

SEED = 41
LAYOUTS = [
    Layout(1),
    Layout(2, 2, "pinned"),
    Layout(3, 1, "interleaved"),
    Layout(3, 2, "uneven"),  # a rank without experts
    Layout(4, 1, "pinned"),
    Layout(8, 1, "interleaved"),
    Layout(8, 1, "uneven"),
    Layout(1, 3),
]
# In `make test` this layout reads all others: replicas, and a rank without experts.
COVER = [LAYOUTS[3]]


def fake_rank(layout: Layout, rank: int, seed: int) -> CheckpointState:
    """Returns the tensors of rank `rank` of a layout, initialised from a seed, with moments computed from the weights."""
    edp_rank, ep_rank = divmod(rank, layout.ep)
    placement = placement_of(layout.placement, layout.ep)
    with torch.device("meta"):
        model = build_model(config_of(layout), placement, ep_rank=ep_rank, ep_group=None)
    initialise(model, placement, ep_rank=ep_rank, device=torch.device("cpu"), seed=seed, std=0.3)
    groups = split_parameters(model, weight_decay=0.1)
    optimizer = make_optimizer(groups, backend="torch", lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    materialise_moments(optimizer)
    set_step_count(optimizer, seed)
    with torch.no_grad():
        for parameter, moments in optimizer.state.items():
            for factor, moment in enumerate(MOMENTS, start=2):
                moments[moment].copy_(parameter).mul_(factor)
    place = RankLayout(placement, rank, layout.world_size, ep_rank, edp_rank, layout.edp)
    return capture(model, optimizer, place, values={"position": 7}, rank_values={"rank": rank})


def ranks(layout: Layout, seed: int) -> list[CheckpointState]:
    return [fake_rank(layout, rank, seed) for rank in range(layout.world_size)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {layout: save_all(ranks(layout, SEED), root / str(layout), 5) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", [layout if layout in COVER else full(layout) for layout in LAYOUTS], ids=str)
def test_every_layout_loads_every_other(saved: dict[Layout, Path], layout: Layout) -> None:
    expected, loaded = ranks(layout, SEED), ranks(layout, 1)
    for writer, path in saved.items():
        with torch.no_grad():
            for state in loaded:
                for tensor in state.tensors().values():
                    tensor.fill_(float("nan"))
        restored = load_all(loaded, path)
        for rank, (state, oracle) in enumerate(zip(loaded, expected, strict=True)):
            assert restored[rank].values == {"position": 7}
            assert restored[rank].rank_values == ({"rank": rank} if writer.world_size == layout.world_size else {})
            assert state.optimizer is not None
            assert step_count(state.optimizer) == SEED or not state.optimizer.state
            assert state.held.keys() == oracle.held.keys()
            for name, tensor in state.tensors().items():
                assert torch.equal(tensor, oracle.tensors()[name]), f"{name} of rank {rank} from {writer}"


def test_fingerprints_are_those_of_every_layout(saved: dict[Layout, Path]) -> None:
    from moe_dist.checkpoint.index import read_index

    prints = [{name: entry.fingerprint for name, entry in read_index(path).tensors.items()} for path in saved.values()]
    assert all(each == prints[0] for each in prints)
    assert len(set(prints[0].values())) > 0.9 * len(prints[0])


def test_a_wrongly_assembled_tensor_is_found(saved: dict[Layout, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of one rank are loaded into another rank's slots without an error, as has happened in other projects."""
    from moe_dist.checkpoint import manager
    from moe_dist.errors import DataError

    real = manager.read_tensors

    def wrong(contents, tensors):  # type: ignore[no-untyped-def]
        real(contents, tensors)
        experts = [name for name in tensors if ".experts.text." in name and name.endswith(".up") and "optim" not in name]
        if len(experts) > 1:
            with torch.no_grad():
                one, other = tensors[experts[0]], tensors[experts[1]]
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    monkeypatch.setattr(manager, "read_tensors", wrong)
    with refused(DataError, "moe.experts.text.", golden=False):
        load_all(ranks(Layout(2, 1, "interleaved"), 1), saved[Layout(8, 1, "uneven")])
