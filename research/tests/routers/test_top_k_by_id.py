"""The router that sets each token's number of experts by its id has the values and gradients of a loop over tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_dist.errors import ConfigError
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routing.draws import logistic
from moe_dist.moe.routing.types import RoutingCache
from research.routers.scheduled_top_k import HELD_OUT
from research.routers.top_k_by_id import TopKByIdRouter
from research.tests.routers.reference import fixed_load_weights
from research.tests.routers.test_scheduled_top_k import GROUP, D, N, T, inputs
from research.tests.routers.test_scheduled_top_k import table as table_of

V, SEED = 5, 3
LOADS = np.array([[9.0] * V, [0.0, 0.4, 1.0, 2.75, 3.0]])  # the router below uses the second row
ID_T = torch.arange(T) * 7 % V


@pytest.fixture
def table(tmp_path: Path) -> str:
    np.save(tmp_path / "loads.npy", LOADS)
    return str(tmp_path / "loads.npy")


def made(table: str) -> TopKByIdRouter:
    router = TopKByIdRouter(RouterContext(D, [GROUP], place=1, seed=SEED), table=table).double()
    with torch.no_grad():
        router.get_parameter("group:all.true").copy_(torch.randn(N, D, generator=torch.Generator().manual_seed(1)))
    return router


def test_equals_the_loop_in_values_and_gradients(table: str) -> None:
    router, (h_TD, group_T) = made(table), inputs()
    fast_TE = table_of(router(h_TD, group_T, RoutingCache(id_T=ID_T)))
    column = torch.zeros(1, dtype=torch.int64)
    uniform = logistic((SEED, HELD_OUT, 1), torch.arange(T), column, torch.float64).sigmoid()[:, 0].tolist()
    rows_ND = router.get_parameter("group:all.true")
    logits_TE = h_TD @ rows_ND.T
    slow_TE = torch.cat([fixed_load_weights(logits_TE[t : t + 1], LOADS[1, ID_T[t]], uniform[t : t + 1]) for t in range(T)])
    torch.testing.assert_close(fast_TE, slow_TE, rtol=0, atol=1e-12)
    score_TE = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    fast, slow = (
        torch.autograd.grad((each * score_TE).sum(), [h_TD, rows_ND], retain_graph=True) for each in (fast_TE, slow_TE)
    )
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_padding_takes_nothing(table: str) -> None:
    router, (h_TD, group_T) = made(table), inputs()
    group_T[5:20] = -1
    taken_T = (table_of(router(h_TD, group_T, RoutingCache(id_T=ID_T))) > 0).any(1)
    assert not taken_T[5:20].any()
    assert taken_T[20:].any()


def test_a_missing_table_is_an_error_but_on_the_meta_device(tmp_path: Path) -> None:
    missing = str(tmp_path / "elsewhere.npy")
    with torch.device("meta"):
        TopKByIdRouter(RouterContext(D, [GROUP]), table=missing)
    with pytest.raises(ConfigError, match=r"elsewhere\.npy: cannot be read"):
        TopKByIdRouter(RouterContext(D, [GROUP]), table=missing)
