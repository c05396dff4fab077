"""A layer that replays recorded choices computes their weights anew. Tests memory, drops and refused choices."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_dist.errors import ConfigError, DataError
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.replayed_routers import Replay
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup
from tests.support.messages import refused
from tests.support.one_rank_layer import one_rank_layer

D = 4
GROUPS = (ExpertGroup("text", 4, 2, 3, 5, 0, ("text",)), ExpertGroup("image", 3, 1, 2, 7, 4, ("image",)))
# Columns 0 to 3 are text's experts, 4 to 6 are image's experts, 7 and 8 are text's null experts, 9 is image's null expert.
IDS = np.array([[[3, 8, 0]], [[9, 4, -1]], [[-1, -1, -1]], [[7, 8, 2]]], np.int16)
GROUP = np.array([0, 1, -1, 0])


def top_k_layer(recompute: str = "none", capacity: Capacity | None = None, **options: Any) -> MoELayer:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(D, GROUPS, capacity=capacity), **options)
    return one_rank_layer(router, D, recompute=recompute).double()


def test_weights_are_computed_anew_with_their_gradient() -> None:
    layer, h_TD = top_k_layer(), torch.randn(4, D, dtype=torch.float64)
    found: list[Tensor] = []
    layer.router.register_forward_hook(lambda _, __, routing: found.append(routing.assignments.weight_N.view(4, 3)))
    with Replay(layer, IDS, GROUP):
        layer(h_TD, torch.tensor(GROUP))
    router: Any = layer.router
    text, image = (h_TD @ router.gate(group).true.T for group in GROUPS)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    expected[0, [0, 2]] = text[0, [3, 0]].softmax(0)
    expected[1, 1] = image[1, :1].softmax(0)
    expected[3, 2] = text[3, 2:3].softmax(0)
    torch.testing.assert_close(found[0], expected)
    direction = torch.randn_like(expected)
    ours, theirs = (
        torch.autograd.grad((each * direction).sum(), router.gate(GROUPS[0]).true) for each in (found[0], expected)
    )
    torch.testing.assert_close(ours, theirs)
    assert ours[0][[0, 3]].abs().min() > 0
    layer(h_TD, torch.tensor(GROUP))
    assert not torch.allclose(found[1], expected), "the routers choose for themselves again"


def test_host_memory_is_two_bytes_a_token_layer_and_choice() -> None:
    tokens, layers = 4096, 6
    model = nn.ModuleList(top_k_layer() for _ in range(layers))
    ids = np.tile(IDS[:1], (tokens, layers, 1)).astype(np.int64)
    tracemalloc.start()
    replay = Replay(model, ids)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert replay.ids_TLK.nbytes == 2 * tokens * layers * 3
    assert kept <= replay.ids_TLK.nbytes + 20_000
    narrow = ids.astype(np.int16)
    assert Replay(model, narrow).ids_TLK is narrow


WRONG = {
    "a layer more": np.repeat(IDS, 2, axis=1),
    "a token less": IDS[:-1],
    "fractions": IDS.astype(np.float32),
    "no such column": np.where(IDS == 8, 10, IDS),
    "a choice is missing": np.where(IDS == 8, -1, IDS),
    "a choice too many": np.where(IDS == -1, 5, IDS),
    "another group": np.where(IDS == 3, 4, IDS),
    "twice": np.where(IDS == 7, 8, IDS),
    "dropped without a capacity": np.where(IDS == 3, -5, IDS),
}


@pytest.mark.parametrize("case", WRONG)
def test_choices_that_do_not_fit_are_refused(case: str) -> None:
    with refused(DataError, "run/trace: "):
        Replay(top_k_layer(), WRONG[case], GROUP, source="run/trace")


def test_drops_are_replayed_in_training_alone() -> None:
    layer, h_TD = top_k_layer(capacity=Capacity(0.1, "probability")), torch.randn(4, D, dtype=torch.float64)
    with Replay(layer, WRONG["dropped without a capacity"], GROUP):
        _, report = layer(h_TD, torch.tensor(GROUP))
    assert report.counts.dropped_LE[0].tolist() == [0, 0, 0, 1, 0, 0, 0]
    with Replay(layer, IDS, GROUP):
        assert layer(h_TD, torch.tensor(GROUP))[1].sent.pairs == 4
    with refused(DataError, "token 0"):
        Replay(layer, np.where(IDS == 8, -10, IDS), GROUP)
    with refused(DataError, "model.moe.capacity"):
        Replay(layer.eval(), WRONG["dropped without a capacity"], GROUP)


@pytest.mark.parametrize("group", [-2, 2])
def test_a_group_outside_the_model_is_refused(group: int) -> None:
    with refused(DataError, "group_T", golden=False):
        Replay(top_k_layer(), IDS, np.array([0, 1, group, 0]))


def test_another_number_of_tokens_is_refused() -> None:
    layer, h_TD = top_k_layer(), torch.randn(5, D, dtype=torch.float64)
    with refused(DataError, "5 tokens"), Replay(layer, IDS, GROUP):
        layer(h_TD, torch.zeros(5, dtype=torch.int64))
    with refused(DataError, "[3]"), Replay(layer, IDS, GROUP):
        layer(h_TD[:3], torch.tensor(GROUP[:3]))
    assert not layer.router._forward_pre_hooks


def test_routers_that_cannot_replay_are_named() -> None:
    plain = (ExpertGroup("all", 7, 0, 2, 5, 0, ("text",)),)
    with refused(ConfigError, "ExpertChoiceRouter"):
        Replay(one_rank_layer(ExpertChoiceRouter(RouterContext(D, plain)), D), IDS, GROUP)
    with refused(ConfigError, "no MoE layer"):
        Replay(nn.Linear(2, 2), IDS, GROUP)
