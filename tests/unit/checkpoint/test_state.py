from collections import Counter

import pytest
import torch
from torch import nn

from moe_dist.checkpoint.state import CheckpointState, RankLayout, capture
from moe_dist.checkpoint.storage import take_snapshot
from moe_dist.optim.optimizer import make_optimizer, split_parameters
from moe_dist.placement.parameter_names import Role
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.support.messages import refused

TEXT = ExpertGroup("text", 3, 0, 2, 6, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 1, 2, 5, 3, ("image",))
GROUPS = (TEXT, IMAGE)
# EP rank 0 holds text/0, text/2 and image/1. Rank 1 holds text/1, rank 2 holds no expert, rank 3 holds image/0.
SLOTS = ExpertPlacement(GROUPS, ((0, 2, 4), (1,), (), (3,)))
D = 4


class Stacks(nn.ParameterDict):
    role = Role.EXPERT


class Tiny(nn.Module):
    """Its parameters have the names of the real model's parameters. All weights of an expert equal the expert's logical
    id."""

    def __init__(self, placement: ExpertPlacement, ep_rank: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, D)
        self.output = nn.Linear(D, 7, bias=False)
        self.output.weight = self.embedding.weight  # tied to the embedding
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("load", torch.arange(3))
        moe = nn.Module()
        moe.router, moe.experts = nn.ModuleDict(), nn.ModuleDict()
        for group in GROUPS:
            local = placement.local_experts(ep_rank, group)
            stacks = Stacks(
                {
                    name: nn.Parameter(torch.zeros(len(local), *shape))
                    for name, shape in (("gate", (group.ffn_dim, D)), ("down", (D, group.ffn_dim)))
                }
            )
            for slot, expert in enumerate(local):
                for stack in stacks.values():
                    stack.data[slot] = expert
            moe.experts[group.name] = stacks
            router = nn.ParameterDict({"true": torch.zeros(group.num_experts, D), "null": torch.zeros(group.num_null, D)})
            moe.router[group.name] = router
        layer = nn.Module()
        layer.moe = moe
        self.layers = nn.ModuleList([layer])


def state_of(ep_rank: int, *, edp_rank: int = 0, edp_size: int = 1) -> tuple[Tiny, CheckpointState]:
    model = Tiny(SLOTS, ep_rank)
    optimizer = make_optimizer(
        split_parameters(model, weight_decay=0.1), backend="torch", lr=1e-3, betas=(0.9, 0.9), eps=1e-8
    )
    layout = RankLayout(SLOTS, edp_rank * 4 + ep_rank, 4 * edp_size, ep_rank, edp_rank, edp_size)
    return model, capture(model, optimizer, layout)


def test_experts_get_their_logical_index() -> None:
    _, state = state_of(0)
    experts = {
        name: held.tensor for name, held in state.held.items() if ".experts." in name and not name.startswith("optimizer")
    }
    prefix = "layers.0.moe.experts"
    assert {name: tuple(t.shape) for name, t in experts.items()} == {
        f"{prefix}.text.0.gate": (6, D),
        f"{prefix}.text.2.gate": (6, D),
        f"{prefix}.text.0.down": (D, 6),
        f"{prefix}.text.2.down": (D, 6),
        f"{prefix}.image.1.gate": (5, D),
        f"{prefix}.image.1.down": (D, 5),
    }
    for name, logical in (("text.0", 0), ("text.2", 2), ("image.1", 4)):
        assert experts[f"{prefix}.{name}.gate"].eq(logical).all()


def test_every_rank_knows_every_name() -> None:
    states = [state_of(ep_rank)[1] for ep_rank in range(4)]
    assert all(state.specs == states[0].specs for state in states)
    names = set(states[0].specs)
    assert {"embedding.weight", "load", "layers.0.moe.experts.image.0.down"} <= names
    assert {"optimizer.exp_avg_sq.embedding.weight", "optimizer.exp_avg.layers.0.moe.experts.text.1.gate"} <= names
    assert not {"scratch", "output.weight", "optimizer.exp_avg.load"} & names


@pytest.mark.parametrize("edp_size", [1, 2, 3])
def test_each_tensor_is_written_by_exactly_one_rank(edp_size: int) -> None:
    states = [state_of(e, edp_rank=d, edp_size=edp_size)[1] for d in range(edp_size) for e in range(4)]
    written = Counter(name for state in states for name in state.written())
    whole = {name for name, spec in states[0].specs.items() if 0 not in spec.shape}
    assert written == Counter(dict.fromkeys(whole, 1))
    one = sum(take_snapshot(0, state).nbytes for state in states)
    assert one == sum(
        torch.empty(spec.shape, dtype=spec.dtype).nbytes for name, spec in states[0].specs.items() if name in whole
    )
    assert sum(bool(state.written()) for state in states) > 1, "copies should be spread over ranks"


def test_frozen_parameters_have_no_moments() -> None:
    model = Tiny(SLOTS, 0)
    model.embedding.weight.requires_grad_(False)
    optimizer = make_optimizer(
        split_parameters(model, weight_decay=0.1), backend="torch", lr=1e-3, betas=(0.9, 0.9), eps=1e-8
    )
    state = capture(model, optimizer, RankLayout(SLOTS, 0, 4))
    assert "embedding.weight" in state.specs
    assert "optimizer.exp_avg.embedding.weight" not in state.specs


def test_extra_state_is_refused() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None: ...

    with refused(TypeError):
        capture(Odd(2, 2), None, RankLayout(SLOTS))
