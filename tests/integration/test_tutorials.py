"""Each notebook of docs/tutorials runs in an empty folder. tests/clusters runs the notebooks for clusters."""

from pathlib import Path

import pytest

from tests.support.cover import exhaustive, full
from tests.support.notebooks import TUTORIALS, run_tutorial

DATA = Path(__file__).parents[2] / ".cache" / "data"
LONG = ("routing_report", "own_data", "hugging_face", "planning")  # each takes a minute
HERE = [path for path in sorted(TUTORIALS.glob("*.ipynb")) if path.stem not in ("slurm", "ray")]


@pytest.mark.parametrize(
    "path",
    [exhaustive(path) if path.stem in LONG else full(path) for path in HERE if path.stem != "own_model"]
    + [TUTORIALS / "own_model.ipynb"],
    ids=lambda path: path.stem,
)
@pytest.mark.slow
def test_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if (DATA / "openmoji" / "manifest.json").exists():  # otherwise notebooks that need this data prepare it in a minute
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "data").symlink_to(DATA)
    run_tutorial(path, tmp_path, monkeypatch)
