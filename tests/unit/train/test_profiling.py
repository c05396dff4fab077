"""Profiles a step of a tiny model. Tests the ranges in its trace, and that a run goes on if profiling fails."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.config.trace_schema import ProfileSection
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check
from moe_dist.train.loop.profiling import StepProfiler
from moe_dist.train.loop.trainer import Trainer
from tests.support.messages import refused
from tests.support.one_rank import OneRank, world_of_one
from tests.support.tiny import tiny_config


def ranges(folder: Path) -> dict[str, int]:
    (path,) = folder.glob("*.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in names}


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def trainer_of(one: OneRank, profiler: StepProfiler) -> Trainer:
    return one.run.trainer(one.resumable, profile=profiler.step)


def test_a_trace_names_layers_and_phases(tiny_data: Path, tmp_path: Path) -> None:
    with world_of_one():
        one = OneRank(tiny_data, tmp_path)
        config, model = one.plan.config, one.training.parallel.model
        before = hooks(model)
        profiler = StepProfiler(model, tmp_path / "p", "rank_0", first=2, last=2, device=torch.device("cpu"))
        trainer = trainer_of(one, profiler)
        for _ in range(3):
            trainer._step()
    found = ranges(tmp_path / "p")
    micro_batches = found["forward"]
    assert {"step 2", "forward", "backward", "reduce gradients", "optimizer"} < found.keys()
    assert "step 1" not in found
    assert "step 3" not in found
    for layer in config.model.moe_layers:
        for part in ("attention", "moe", "moe.router", "moe.experts", "plan", "dispatch", "combine"):
            assert found[f"layer {layer}/{part}"] == micro_batches
    assert hooks(model) == before, "later steps cost nothing"
    assert not any("dispatch" in vars(moe.dispatcher) for moe in model.moe_modules())
    memory: dict[str, Any] = json.loads((tmp_path / "p" / "rank_0_from_step_2.memory.json").read_text())
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    assert memory["parameters_mib"] == pytest.approx(parameters / 2**20)
    assert memory["process_mib"] > memory["parameters_mib"]
    assert memory["ranges_mib"].keys() >= found.keys()


def profiler_of(folder: Path, last: int) -> StepProfiler:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    return StepProfiler(model, folder, "rank_3", first=2, last=last, device=torch.device("cpu"))


def test_a_run_that_ends_early_still_has_its_trace(tmp_path: Path) -> None:
    profiler = profiler_of(tmp_path, last=9)
    for number in (1, 2):
        with profiler.step(number):
            pass
    profiler.close()
    profiler.close()
    assert ranges(tmp_path) == {"step 2": 1}


def test_a_run_goes_on_if_its_profile_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file in place of the folder")
    with profiler_of(tmp_path / "profile", last=2).step(2):
        pass
    assert "monitor.profile" in caplog.text


def test_steps_and_ranks_that_do_not_exist_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    with refused(ValueError):
        ProfileSection(steps=(12, 10))
    with refused(ConfigError):
        check(tiny_config(tiny_data, tmp_path, {"monitor.profile": {"steps": [1, 2], "ranks": [99]}}))
