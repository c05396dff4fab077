"""Configurations stored before the format had a number are read with the names and defaults of that time."""

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config.keys import find
from moe_dist.config.load import load_config, load_stored_config, resolved_yaml
from moe_dist.config.schema import BalanceSection, Config
from moe_dist.config.stored_format import FORMAT, KEYS, REMOVED, VALUES, translate
from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError

OLD = """
model:
  depths: {every: 2, set: world}
  moe:
    capacity: {factor: 1.25, set: rank}
    router: {kind: expert_choice, set: world}
    balance: [{kind: loss_free}, {kind: load_target, target: {loads: 1.5}}]
parallel: {dispatch: {kind: per_pair}}
"""
NEW = """
model:
  mixture_of_depths: {every: 2, scope: world}
  moe:
    capacity: {factor: 1.25, scope: rank}
    router: {kind: expert_choice, scope: world}
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
    assert translate(new) == new


def test_a_stored_configuration_gets_the_balance_loss_of_its_time() -> None:
    assert translate({"loss": {"balance": {"kind": "vanilla"}}})["loss"]["balance"]["scope"] == "micro_batch"
    for scope in ("step", "micro_batch"):
        assert translate({"loss": {"balance": {"scope": scope}}})["loss"]["balance"]["scope"] == scope
    numbered = {"format": FORMAT, "loss": {"balance": {"kind": "vanilla"}}, "model": {"depths": None}}
    assert translate(numbered) == numbered, "a configuration with a number is as it was written"
    assert BalanceSection().scope == "step"  # the default in a new configuration


def test_a_removed_key_is_left_out_only_if_it_had_no_effect() -> None:
    for key, value in ((key, value) for key, values in REMOVED.items() for value in values):
        *holders, name = key.split(".")
        for head in ({}, {"format": FORMAT}):
            stored: Any = {name: value, "kept": 1}
            read: Any = {"kept": 1}
            for holder in reversed(holders):
                stored, read = {holder: stored}, {holder: read}
            assert translate({**head, **stored}) == {**head, **translate(read)}, key
        assert not find(Config, key), key
    used = {"format": FORMAT, "loss": {"distillation": {"top_logits": "words"}}}
    assert translate(used) == used, "it is refused as an unknown key"
    ruled = {"format": FORMAT, "run": {"init_rules": ["split_experts", "upcycle"]}}
    assert translate(ruled)["run"] == {"init_rules": ["upcycle"]}, "a resumed run does not read the rules again"


def test_every_new_name_is_in_the_schema_and_no_old_one() -> None:
    for old, new in KEYS.items():
        assert find(Config, f"{old.rpartition('.')[0]}.{new}"), new
        assert not find(Config, old), old
    for key, values in VALUES.items():
        kinds = {kind for each in find(Config, key.replace("*", "0")) for kind in _literals(each.annotation)}
        assert kinds >= set(values.values()), key
        assert not kinds & set(values), key


def _literals(annotation: Any) -> tuple[str, ...]:
    return annotation.__args__


def test_a_run_stores_the_number_and_another_number_is_refused(path: Path) -> None:
    text = resolved_yaml(load_config(path))
    assert text.startswith(f"format: {FORMAT}\n")
    path.write_text(text)
    assert load_stored_config(path) == load_config(path)
    path.write_text(text.replace(f"format: {FORMAT}", "format: 2"))
    with pytest.raises(ConfigError, match="format=2: must be 1"):
        load_stored_config(path)
