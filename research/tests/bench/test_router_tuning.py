"""research.bench.router_tuning compares router tuning with training all parameters. Tuning keeps far fewer moments."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from moe_dist.config.load import resolved_yaml
from research.bench.router_tuning import main
from tests.support.tiny import IMAGE_IDS, tiny_config
from tests.support.tuning_samples import made_samples

pytestmark = pytest.mark.slow


def test_both_arms_are_told(tiny_data: Path, tmp_path: Path) -> None:
    model = tiny_config(tiny_data, tmp_path).model.model_dump(mode="json")
    samples = made_samples(tmp_path / "samples", ids=(4, IMAGE_IDS[1]), layers=(0, 1), columns=8, model=model)
    config = tiny_config(
        tiny_data,
        tmp_path,
        {
            "parallel.ep": 1,
            "placement.policy": "interleaved",
            "train.only": "routers",
            "run.init_from": "nowhere",  # never read: the bench starts with initial weights
            "loss.balance.schedule": [[0, 0.0]],
            "router_tuning": {"data": str(samples), "last_layers": 1},
        },
    )
    (tmp_path / "run.yaml").write_text(resolved_yaml(config))
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(tmp_path / "run.yaml"), "--rounds", "2"])
    assert done.exit_code == 0, done.output
    lines = {line[:14].strip(): line.split() for line in done.stdout.splitlines()}
    state = {name: int(lines[name][-1].replace(",", "")) for name in ("router tuning", "everything")}
    assert 0 < state["router tuning"] < state["everything"] / 20
    assert "median over 2 rounds" in done.stdout
