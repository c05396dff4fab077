"""Stored configurations have a format number. Other numbers, and configurations without a number, are refused."""

import json
from pathlib import Path

import pytest

from moe_dist.checkpoint.index import StateFile
from moe_dist.config.load import load_config, load_stored_config, resolved_yaml
from moe_dist.errors import ConfigError


def test_a_run_stores_the_number_and_another_or_none_is_refused(path: Path) -> None:
    config = load_config(path)
    text = resolved_yaml(config)
    assert text.startswith("format: 1\n")
    path.write_text(text)
    assert load_stored_config(path) == config
    for stored, problem in (("format: 2\n", "format=2: must be 1"), ("", "format: missing; .* cannot know its defaults")):
        path.write_text(text.replace("format: 1\n", stored))
        with pytest.raises(ConfigError, match=problem):
            load_stored_config(path)


def test_a_checkpoint_of_a_configuration_without_a_number_is_refused(path: Path) -> None:
    stored = load_config(path).model_dump(mode="json")
    state = {"save_id": "a", "step": 1, "world_size": 1, "optimizer_steps": 1, "placement": {}, "versions": {}}
    assert StateFile.model_validate_json(json.dumps({**state, "values": {"config": stored}})).values["config"] == stored
    del stored["format"]
    with pytest.raises(ValueError, match="config has no format"):
        StateFile.model_validate_json(json.dumps({**state, "values": {"config": stored}}))
