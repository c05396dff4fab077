"""Rules of the levers of `rank_balance` for the rest of a configuration."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check
from tests.support.messages import refused
from tests.support.tiny import tiny_config

DEALING = {"rank_balance.dealing": True}
CHOICE = {"model.moe.router": {"kind": "expert_choice"}, "loss.balance.schedule": [[0, 0.0]]}
NO_NULLS = {
    "text": {"num_experts": 4, "top_k": 1, "ffn_dim": 16},
    "image": {"num_experts": 2, "top_k": 1, "ffn_dim": 24},
}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({**CHOICE, "model.moe.groups": NO_NULLS}, "a token's experts must not depend on its place"),
        ({"model.moe.capacity": {"factor": 1.5}}, "compete for a capacity"),
        ({"model.mixture_of_depths": {"capacity": 0.5}}, "the tokens of some ranks compete"),
    ],
    ids=["expert choice", "capacity", "depths"],
)
def test_dealing_is_refused_where_it_would_change_the_step(tiny_data: Path, changes: dict[str, Any], key: str) -> None:
    with refused(ConfigError, "rank_balance.dealing", key):
        check(tiny_config(tiny_data, Path("runs"), {**DEALING, **changes}))


REPLICATING = {"rank_balance.replicating": {}}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rank_balance.moving": {}}, "both levers would answer the same load"),
        ({"model.moe.experts": {"kind": "clamped_ffn"}}, "model.moe.experts.kind=clamped_ffn"),
        ({"parallel.dispatch": {"kind": "static", "room": 2.0}}, "parallel.dispatch.kind=static"),
        ({"parallel.two_batch_overlap": True}, "between the exchanges of the other half"),
        ({**CHOICE, "model.moe.groups": NO_NULLS}, "where experts take equally many tokens, none is hot"),
    ],
    ids=["moving", "experts", "dispatch", "two batches", "expert choice"],
)
def test_replicating_is_refused_where_replicas_get_no_rows(tiny_data: Path, changes: dict[str, Any], key: str) -> None:
    with refused(ConfigError, "rank_balance.replicating", key, "or remove rank_balance.replicating"):
        check(tiny_config(tiny_data, Path("runs"), {**REPLICATING, **changes}))


@pytest.mark.parametrize(
    "dispatch",
    [{}, {"overlap": True}, {"chunks": 2}, {"kind": "hierarchical", "ranks_per_node": 1}],
    ids=["plain", "overlap", "chunks", "hierarchical"],
)
def test_replicating_fits_token_choice(tiny_data: Path, dispatch: dict[str, Any]) -> None:
    changes = {**REPLICATING, "parallel.dispatch": {"kind": "all_to_all", **dispatch}}
    assert check(tiny_config(tiny_data, Path("runs"), changes)).config.rank_balance.replicating is not None


def test_dealing_fits_token_choice(tiny_data: Path) -> None:
    assert check(tiny_config(tiny_data, Path("runs"), DEALING)).config.rank_balance.dealing
