"""Noise on router rows has the given scale, and a run can start from the disturbed checkpoint."""

from pathlib import Path

import pytest
import torch

from moe_dist.errors import DataError
from moe_dist.inference.loaded_run import CheckpointReader, find_trained
from research.experiments.disturbance import Noise, disturb, find_scale, router_rows
from research.experiments.study import DisturbanceSection
from tests.support.messages import refused
from tests.support.pictured import pictured_run


def test_noise_has_the_scale_of_the_rows_and_one_direction() -> None:
    rows = [0.1 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.full((2, 2), 3.0)]
    clean = [each.clone() for each in rows]
    noise = Noise(rows, seed=1)
    noise.add(2.0)
    twice = rows[0] - clean[0]
    assert float(twice.std()) == pytest.approx(2.0 * float(clean[0].std()), rel=0.05)
    assert torch.equal(rows[1], clean[1]), "equal rows have no deviation"
    noise.add(1.0)
    torch.testing.assert_close(rows[0] - clean[0], twice / 2)
    noise.add(0.0)
    assert torch.equal(rows[0], clean[0])


@pytest.mark.parametrize(
    ("accuracies", "scale", "tried"),
    [
        ({0.0: 0.65, 0.5: 0.6, 1.0: 0.45, 2.0: 0.3}, 1.0, ["0", "0.5", "1"]),  # chance (25 %) + half of 40 points is 45 %
        ({0.0: 0.65, 0.5: 0.6, 1.0: 0.46, 2.0: 0.46}, 2.0, ["0", "0.5", "1", "2"]),  # no scale is enough
    ],
)
def test_noise_grows_until_half_of_what_is_above_chance_is_lost(
    accuracies: dict[float, float], scale: float, tried: list[str]
) -> None:
    section = DisturbanceSection(scales=(0.5, 1.0, 2.0), keep=0.5)
    assert find_scale(section, accuracies.__getitem__) == (scale, {key: accuracies[float(key)] for key in tried})


@pytest.mark.slow
def test_the_disturbed_checkpoint_differs_in_the_routers_of_the_layers_alone(own_data: Path, tmp_path: Path) -> None:
    trained = find_trained(pictured_run(own_data, tmp_path / "run", max_seq_len=192, model__mixture_of_depths=None))
    reader = CheckpointReader(trained.folder.parent, trained.config, torch.device("cpu"))
    layers = trained.config.model.moe_layers[-1:]
    shares = iter([0.65, 0.64, 0.3])
    section = DisturbanceSection(scales=(0.5, 1.0, 2.0))
    made = disturb(reader, trained.folder, tmp_path / "out", layers, section, seed=3, accuracy=lambda: next(shares))
    assert made == {
        "folder": str(tmp_path / "out"), "scale": 1.0, "valid": {"0": 0.65, "0.5": 0.64, "1": 0.3}, "layers": list(layers),
    }  # fmt: skip
    before, after = (
        find_trained(path).load(torch.device("cpu")).state_dict() for path in (trained.folder, tmp_path / "out")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(f"layers.{layers[0]}.moe.router.") for name in changed)
    assert find_trained(tmp_path / "out").step == trained.step
    assert len(router_rows(reader.model, layers)) == len(changed)
    with refused(DataError, "holds a disturbed checkpoint"):
        disturb(reader, trained.folder, tmp_path / "out", layers, section, seed=3, accuracy=lambda: 0.3)
