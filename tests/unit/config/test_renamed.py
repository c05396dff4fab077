"""Old names of keys and kinds are refused with the new name in a new file, and translated in a stored run."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.keys import find
from moe_dist.config.load import load_config
from moe_dist.config.renamed import KEYS, VALUES, new_key, translate, translation
from moe_dist.config.schema import BalanceSection, Config
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError

OLD = """
model:
  depths: {every: 2, set: world}
  moe:
    capacity: {factor: 1.25, set: rank}
    router: {kind: fixed_load, loads: {set: [1.0]}}
    balance: [{kind: loss_free}, {kind: load_target, target: {loads: 1.5}}]
parallel: {dispatch: {kind: per_pair}}
"""
NEW = """
model:
  mixture_of_depths: {every: 2, scope: world}
  moe:
    capacity: {factor: 1.25, scope: rank}
    router: {kind: scheduled_top_k, active_experts: {set: [1.0]}}
    balance: [{kind: loss_free}, {kind: active_experts, target: {loads: 1.5}}]
parallel: {dispatch: {kind: known_counts}}
"""


def plain(text: str) -> Any:
    values, problems = load_yaml(text)
    assert not problems
    return values


def test_a_stored_configuration_takes_the_new_names_and_a_new_one_stays() -> None:
    old, new = plain(OLD), plain(NEW)
    assert translate(old) == new
    assert old == plain(OLD)
    assert translation(new) == (new, [])
    assert [(r.old, r.new) for r in translation(old)[1]][:2] == [
        ("model.depths", "model.mixture_of_depths"),
        ("model.depths.set", "model.mixture_of_depths.scope"),
    ]


def test_a_stored_configuration_gets_the_balance_loss_of_its_time() -> None:
    assert translate({"loss": {"balance": {"kind": "vanilla"}}})["loss"]["balance"]["scope"] == "micro_batch"
    stored = {"loss": {"balance": {"scope": "step"}}}
    assert translate(stored) == stored
    assert translate({"loss": None}) == {"loss": None}
    assert BalanceSection().scope == "step"  # of a new configuration


def test_what_is_no_mapping_comes_back() -> None:
    assert translate(None) is None
    assert translate({"model": 3, "parallel": {"dispatch": ["per_pair"]}}) == {
        "model": 3,
        "parallel": {"dispatch": ["per_pair"]},
    }


def test_every_new_name_is_in_the_schema_and_no_old_one() -> None:
    for old, new in KEYS.items():
        assert find(Config, f"{old.rpartition('.')[0]}.{new}"), new
        assert not find(Config, old), old
    for key, values in VALUES.items():
        kinds = {kind for each in find(Config, key.replace("<index>", "0")) for kind in _literals(each.annotation)}
        assert kinds >= set(values.values()), key
        assert not kinds & set(values), key


def _literals(annotation: Any) -> tuple[str, ...]:
    return annotation.__args__


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("model.depths.set", "model.mixture_of_depths.scope"),
        ("model.moe.router.loads.all.0", "model.moe.router.active_experts.all.0"),
        ("model.moe.router.scope", None),
    ],
)
def test_the_new_key_of_an_override(key: str, new: str | None) -> None:
    assert new_key(key) == new


def test_old_names_are_refused_with_the_new_ones(path: Path) -> None:
    path.write_text(path.read_text().replace("{ep: 2}", "{ep: 2, dispatch: {kind: per_node, ranks_per_node: 1}}"))
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["model.depths.every=2", "model.moe.router.kind=fixed_load"])
    told = "\n".join(raised.value.problems)
    assert "model.depths.every: has been renamed; write model.mixture_of_depths.every" in told
    assert "model.moe.router.kind=fixed_load: has been renamed; write model.moe.router.kind=scheduled_top_k" in told
    assert "parallel.dispatch.kind=per_node: has been renamed; write parallel.dispatch.kind=hierarchical" in told
    with pytest.raises(ConfigError, match=r"kind=deep_ep: has been renamed; write parallel\.dispatch\.kind=deep_ep_v2"):
        load_config(path, ["parallel.dispatch={kind: deep_ep}"])
