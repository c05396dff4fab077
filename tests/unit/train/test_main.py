"""Tests the command line of a training run, on the ranks and on their launcher."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launchers import local
from moe_dist.config.load import load_config
from moe_dist.train import __main__ as train
from tests.support.invoked import invoke
from tests.support.tiny import tiny_config, write_config


@pytest.mark.parametrize(("module", "called"), [(train, "_attempt"), (local, "launch")], ids=["rank", "launcher"])
def test_init_from_is_the_override_of_that_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, called: str
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(module, called, lambda _config, overrides, *_, **__: given.append(overrides) or 0)
    path = write_config(tiny_config(tmp_path, tmp_path), tmp_path / "x.yaml")
    for arguments in (["train.steps=7"], ["train.steps=7", "--init-from", "runs/a b"]):
        invoke(module.main, path, *arguments, code=0)
    without, begun = (load_config(path, overrides) for overrides in given)
    assert (without.run.init_from, begun.run.init_from) == (None, "runs/a b")
    assert without.train.steps == begun.train.steps == 7


@pytest.mark.parametrize(("device", "threads"), [("cuda", ""), ("auto", "3"), ("cpu", "")])
def test_a_rank_binds_itself_near_its_gpu_before_it_trains(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, device: str, threads: str
) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": threads}
    variables = {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    calls: list[Any] = []
    monkeypatch.setattr(train, "os", SimpleNamespace(environ=variables))
    monkeypatch.setattr(train, "bind_near_gpu", lambda *given, **options: calls.append((given, options)))
    monkeypatch.setattr(train, "train", lambda *_: calls.append("train"))
    path = write_config(tiny_config(tiny_data, tmp_path / "runs", {"parallel.device": device}), tmp_path / "x.yaml")
    assert train._attempt(path, [], False) == 0
    bound = [((1, 2, variables), {"lower_threads": not threads})] if device != "cpu" else []
    assert calls == [*bound, "train"]
