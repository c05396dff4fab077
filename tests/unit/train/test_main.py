"""The command line of a run, on the side of the ranks and of their launcher."""

from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from launchers import local
from moe_dist.config.load import load_config
from moe_dist.train import __main__ as train
from tests.support.tiny import tiny_config, write_config


@pytest.mark.parametrize(("module", "called"), [(train, "_attempt"), (local, "launch")], ids=["rank", "launcher"])
def test_init_from_is_the_override_of_that_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, called: str
) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(module, called, lambda _config, overrides, *_, **__: given.append(overrides) or 0)
    path = write_config(tiny_config(tmp_path, tmp_path), tmp_path / "x.yaml")
    app = typer.Typer()
    app.command()(module.main)
    for arguments in (["train.steps=7"], ["train.steps=7", "--init-from", "runs/a b"]):
        assert CliRunner().invoke(app, [str(path), *arguments]).exit_code == 0
    without, begun = (load_config(path, overrides) for overrides in given)
    assert (without.run.init_from, begun.run.init_from) == (None, "runs/a b")
    assert without.train.steps == begun.train.steps == 7
