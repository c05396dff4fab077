"""A mistake in model.lora, or in a folder of adapters, is refused with a message that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_dist.errors import ConfigError, DataError
from moe_dist.hf.host.lora import first_values
from moe_dist.hf.host.lora_names import hosted_tensors
from moe_dist.hf.peft_files import CONFIG_FILE, WEIGHTS_FILE
from moe_dist.plan.policies import expert_groups, replicated_placement
from moe_dist.train.build.hosted import build_hosted
from tests.support.hosted import hosted_config, of_family
from tests.support.messages import hold, refused

LORA: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"], "parameters": ["experts.down_proj"]}


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"targets": ["q_prj"]}, {}),
        ({"targets": ["gate"]}, {}),  # a router
        ({"parameters": ["down_proj.weight", "gate"]}, {}),
        ({}, {"train.only": None}),
        ({}, {"run.init_from": "runs/base"}),
        (None, {}),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any] | None, more: dict[str, Any]) -> None:
    model = {**of_family("qwen3_moe"), "lora": None if changes is None else {**LORA, **changes}}
    config = hosted_config(tmp_path, tmp_path, model, {"train.only": "adapters", **more})
    problems = [each.problem for part in (config.engine, config.train) for each in part.violations_in(config)]
    assert problems
    hold("\n".join(problems))


@pytest.mark.parametrize("changes", [{"rank": 0}, {"dropout": 0.1}, {"targets": [], "parameters": []}])
def test_a_section_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with refused(ValueError, *changes):
        hosted_config(tmp_path, tmp_path, {**of_family("qwen3_moe"), "lora": {**LORA, **changes}}, {})


@pytest.mark.parametrize("fault", ["r", "use_dora", "missing", "unknown", "shape", "dtype", "damaged"])
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, fault: str) -> None:
    model = {**of_family("qwen3_moe"), "lora": {**LORA, "folder": str(tmp_path)}}
    config = hosted_config(tmp_path, tmp_path, model, {"parallel.ep": 1})
    placement = replicated_placement(expert_groups(config.model.moe))
    hosted = build_hosted(config, placement, ep_rank=0, ep_group=None)
    parameters = {name: each.detach() for name, each in hosted.named_parameters()}

    def read(name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        owner, _, expert = path.rpartition(".")
        return parameters[name] if name in parameters else parameters[f"{owner}.{leaf}"][int(expert)]

    tensors = dict(hosted_tensors(config.model, read))
    first = min(tensors)
    fields = {"peft_type": "LORA", "r": 3 if fault == "r" else 2, "lora_alpha": 4, "use_dora": fault == "use_dora"}
    if fault == "missing":
        del tensors[first]
    elif fault == "unknown":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 32)
    elif fault == "shape":
        tensors[first] = tensors[first][:-1]
    elif fault == "dtype":
        tensors[first] = tensors[first].to(torch.int8)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    save_file({name: each.clone() for name, each in tensors.items()}, tmp_path / WEIGHTS_FILE)
    if fault == "damaged":
        (tmp_path / WEIGHTS_FILE).write_bytes(b"no tensors")
    assert config.model.lora is not None
    with refused(DataError if fault == "damaged" else ConfigError):
        list(first_values(hosted, config.model.lora, placement.slots[0], 0))
