"""Whole runs of router tuning refuse a changed base and changed samples. test_resume.py resumes such runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import IMAGE_IDS, tiny_config
from tests.support.tuning_samples import made_samples
from tests.support.whole_run import WholeRun, whole_run
from tests.support.worlds import WorldError

BASE = {"train.steps": 2, "evaluation.every": 100, "evaluation.final_sequences": 4, "checkpoint.every": 2}
TUNED = {
    **BASE, "train.only": "routers", "train.steps": 6, "train.global_batch": 4, "train.micro_batch": 1,
    "optimizer.lr": 1e-2, "optimizer.schedule": {"kind": "constant"}, "loss.balance.schedule": [[0, 0.0]],
    "checkpoint.every": 3,
}  # fmt: skip


class Site:
    """The runs in one folder, and samples made from the base run."""

    def __init__(self, run_in_world: Callable[..., list[Any]], data: Path, root: Path) -> None:
        self._run_in_world, self._data, self.root = run_in_world, data, root
        self.base: list[WholeRun] = run_in_world(2, whole_run, data, root, {**BASE, "run.name": "base"})
        self.samples = self.made("samples")

    def made(self, name: str, **options: Any) -> Path:
        model = tiny_config(self._data, self.root).model.model_dump(mode="json")
        options = {"base": self.root / "base", "layers": (0, 1), "columns": 8, **options}
        return made_samples(self.root / name, ids=(4, IMAGE_IDS[1]), model=model, **options)

    def tune(self, name: str, *, section: dict[str, Any] | None = None, ranks: int = 2, **changes: Any) -> list[WholeRun]:
        tuning = {"data": str(self.samples), "last_layers": 1, **(section or {})}
        values = {**TUNED, "run.name": name, "run.init_from": str(self.root / "base"), "router_tuning": tuning}
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        return self._run_in_world(ranks, whole_run, self._data, self.root, {**values, **changes})


@pytest.fixture(scope="module")
def site(run_in_world: Callable[..., list[Any]], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(run_in_world, tiny_data, tmp_path_factory.mktemp("runs"))


def test_other_weights_than_the_scored_ones_are_refused(site: Site) -> None:
    other = site.made("of-other", checkpoint="f" * 64, base=None)
    with pytest.raises(
        WorldError, match=r"made from the weights ffffffffffffffff\.\.\. \(step 0 of runs/base\), but .* has "
    ):
        site.tune("other-base", section={"data": str(other)}, ranks=1, parallel__ep=1, placement__policy="interleaved")


def test_other_samples_under_the_same_path_end_a_resume(site: Site) -> None:
    folder = site.made("swapped")
    site.tune("swaps", section={"data": str(folder)}, train__steps=3)
    folder.rename(site.root / "moved")
    site.made("swapped", seed=1)
    with pytest.raises(WorldError, match="these are not the samples that the run was tuned on"):
        site.tune("swaps", section={"data": str(folder)})
