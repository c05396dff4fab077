"""Tests the checks of the model section and of model folders for engine.kind=transformers."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.config.load import load_config, resolved_yaml
from moe_dist.errors import ConfigError
from moe_dist.hf.host import banks, family
from moe_dist.hf.host.family import complete, read_fields
from moe_dist.hf.host.weights import read_folder
from moe_dist.moe.routers.recorded import recorded_routers
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.train.build.hosted import build_hosted, share_biases
from tests.support.hosted import FAMILIES, hosted_config, of_family
from tests.support.messages import refused
from tests.support.tiny import tiny_config, write_config


def test_sizes_are_the_familys(tmp_path: Path) -> None:
    """The sizes follow from the family's fields. The first layer of this DeepSeek-V3 is dense."""
    model = hosted_config(tmp_path, tmp_path, of_family("deepseek_v3"), {}).model
    assert (model.hidden_dim, model.num_layers, model.vocab_size, model.moe_layers) == (32, 3, 64, (1, 2))
    (group,) = model.moe.groups.values()
    assert (group.num_experts, group.top_k, group.ffn_dim, group.modalities) == (8, 2, 16, ("text", "image"))


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({}, "model.folder"),
        ({"family": "no_such"}, "model.family='no_such'"),
        ({"family": "gpt2", "fields": {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64}}, "model.family"),
        ({"family": "qwen3_moe", "fields": {"hidden_size": "wide"}}, "model.fields"),
        (
            {"family": "qwen3_moe", "fields": {"quantization_config": {"quant_method": "fp8"}}},
            "model.fields.quantization_config",
        ),
        ({**of_family("qwen3_moe"), "hidden_dim": 64}, "model.hidden_dim=64"),
        ({**of_family("qwen3_moe"), "norm_eps": 0.1}, "model.norm_eps=0.1"),
        ({"family": "qwen3_moe", "fields": {"num_expert": 8}}, "model.fields.num_expert"),
        ({"folder": "nowhere"}, "model.folder='nowhere'"),
        ({**of_family("qwen3_moe"), "moe": {"groups": {"image": {}}}}, "model.moe.groups.image"),
        (
            {**of_family("deepseek_v3"), "moe": {"groups": {"experts": {"num_null": 8}}}},
            "model.moe.groups.experts.num_null",
        ),
    ],
)
def test_a_section_is_refused(tmp_path: Path, model: dict[str, Any], key: str) -> None:
    with refused(ConfigError, key, golden="wide" not in str(model)):  # "wide": the text comes from transformers
        hosted_config(tmp_path, tmp_path, model, {})


def test_all_layers_share_one_search_for_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search visits all layers. With one search per layer, a model of 4,096 layers would take minutes."""
    searches: list[Any] = []
    monkeypatch.setattr(banks, "recorded_routers", lambda model: searches.append(model) or recorded_routers(model))
    with torch.device("meta"):
        found = banks.banks_of(family.empty_model("olmoe", FAMILIES["olmoe"]))
    assert (len(searches), len(found) > 1) == (1, True)


def test_fields_beside_a_folder_must_be_its_own(tmp_path: Path) -> None:
    """So that a dry run needs no folder, a configuration may repeat fields of its folder, but only with equal values."""
    stored = {**FAMILIES["olmoe"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe", **stored}))
    given = {"folder": str(tmp_path), "family": "olmoe"}
    some = {"intermediate_size": 16, "rope_parameters": {"rope_theta": 1e4}}
    assert complete({**given, "fields": some})["fields"] == stored
    with pytest.raises(ConfigError, match=r"model\.fields\.intermediate_size: is not that of"):
        complete({**given, "fields": {"intermediate_size": 32}})
    with pytest.raises(ConfigError, match=r"model\.fields\.rope_parameters\.rope_theta: is not that of"):
        complete({**given, "fields": {"rope_parameters": {"rope_theta": 5e5}}})


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "moe_dist.hf.host.family")
    with refused(ConfigError, f"no module {module};"):
        hosted_config(tmp_path, tmp_path, {"family": "qwen3_moe"}, {})


def test_a_family_without_selection_biases_has_no_controller(tmp_path: Path) -> None:
    config = hosted_config(tmp_path, tmp_path, of_family("qwen3_moe"), {"parallel.ep": 1})
    with torch.device("meta"):
        model = build_hosted(config, replicated_placement(expert_groups(config.model.moe)), ep_rank=0, ep_group=None)
    with refused(ConfigError, "model.moe.balance"):
        share_biases(model)


CODE = {"model_type": "align_text_model", "auto_map": {"AutoModel": "evil.Evil"}}


@pytest.mark.parametrize(
    ("family", "changes", "key"),
    [
        ("fuyu", {"text_config": CODE}, "auto_map"),  # transformers would offer to run this code
        ("qwen3_moe", {"attribute_map": {"x": "auto_map"}, "x": CODE["auto_map"]}, "attribute_map"),
        ("qwen3_moe", {"experts_implementation": "sonicmoe"}, "experts_implementation"),
        ("fuyu", {"text_config": {"model_type": "align_text_model", "_name_or_path": "evil"}}, "_name_or_path"),
        ("qwen3_moe", {"name_or_path": "evil"}, "name_or_path"),
        ("qwen3_moe", {"problem_type": ["\x1b[31m"]}, "problem_type='\\x1b[31m'"),
        ("qwen3_moe", {"rope_parameters": {"\x1b[31m": 1}}, "\\x1b[31m"),
        ("qwen3_moe", {"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ("qwen3_moe", {"decoder_sparse_step": 10**10}, "decoder_sparse_step=10000000000"),
        ("fuyu", {"text_config": {"num_labels": 10**9}}, "num_labels=1000000000"),
        ("hrm_text", {"num_layers_per_stack": 5000}, "num_layers_per_stack=5000"),
        ("fuyu", {"text_config": {"backbone": "evil/repo"}}, "backbone='evil/repo'"),
    ],
)
@pytest.mark.parametrize("folder", [None, "nowhere"])  # a stored configuration has folder and fields
def test_fields_that_could_do_harm_are_refused(folder: str | None, family: str, changes: dict[str, Any], key: str) -> None:
    with refused(ConfigError, key, golden=False):
        complete({"folder": folder, "family": family, "fields": {**FAMILIES.get(family, {}), **changes}})


def test_fields_of_a_folder_have_no_notes_and_are_checked(tmp_path: Path) -> None:
    fields = {"text_config": {"num_labels": 10**9}}
    notes = {"_name_or_path": "x", "text_config": {"name_or_path": "x", **fields["text_config"]}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fuyu", **notes}))
    assert read_fields(tmp_path) == {"model_type": "fuyu", **fields}
    with refused(ConfigError, "num_labels=1000000000"):
        complete({"folder": str(tmp_path)})


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Both files are checked. An export would copy the second one, the tokenizer's configuration."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (tmp_path / name).write_text(json.dumps({"model_type": "qwen3_moe", "auto_map": {"AutoModel": "evil.Model"}}))
    with refused(ConfigError, "auto_map"):
        hosted_config(tmp_path, tmp_path, {"folder": str(tmp_path)}, {})


def test_a_resolved_configuration_is_read_again(tmp_path: Path) -> None:
    config = hosted_config(tmp_path, tmp_path, of_family("deepseek_v3"), {})
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(config))
    assert load_config(path) == config


def test_a_family_that_cannot_be_made_is_the_only_problem(tmp_path: Path) -> None:
    """Without a family, fields such as `hidden_dim` are missing, too. The error does not list them."""
    path = write_config(tiny_config(tmp_path, tmp_path), tmp_path / "run.yaml")
    model = "model={family: mixtral, fields: {num_key_value_heads: 0}}"
    with pytest.raises(ConfigError) as error:
        load_config(path, ["engine={kind: transformers}", model])
    assert [each.partition(":")[0] for each in error.value.problems] == ["model.family='mixtral'"]


def test_own_engine_trains_no_folder(tmp_path: Path) -> None:
    path = write_config(tiny_config(tmp_path, tmp_path), tmp_path / "run.yaml")
    config = load_config(path, ["model.folder=some"])  # rules between sections are checked later
    assert [each.keys for each in config.model.violations_in(config)] == [("model.folder", "engine.kind")]


def test_settings_without_this_engine_are_named(tmp_path: Path) -> None:
    changes = {"model.moe.capacity": {"factor": 1.0}, "model.moe.router": {"kind": "relu"}, "parallel.compile": True}
    config = hosted_config(tmp_path, tmp_path, of_family("mixtral"), changes)
    broken = {key for each in config.engine.violations_in(config) for key in each.keys}
    assert broken == {"engine.kind", "model.moe.capacity", "model.moe.router.kind", "parallel.compile"}


@pytest.mark.parametrize("fault", ["missing", "unknown", "of another shape", "experts.down_proj (no memory)"])
def test_a_folder_that_does_not_fit_its_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**FAMILIES["qwen3_moe"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unknown":
        tensors["model.layers.1.extra"] = torch.zeros(1)
    elif fault != "of another shape":  # transformers' own error in joining an expert's matrices
        error = mock.Mock(side_effect=RuntimeError("no memory"))
        monkeypatch.setattr("transformers.core_model_loading.MergeModulelist.convert", error)
    else:
        tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = hosted_config(tmp_path, tmp_path, of_family("qwen3_moe"), {"parallel.ep": 1})
    placement = replicated_placement(expert_groups(config.model.moe))
    model = build_hosted(config, placement, ep_rank=0, ep_group=None)
    with refused(ConfigError, fault):
        read_folder(model, tmp_path, placement.slots[0])
