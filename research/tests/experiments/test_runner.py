"""The runner limits the number of ranks that run at the same time. Fake processes end at their third poll."""

import json
from pathlib import Path
from typing import Any

import pytest

from research.experiments import runner
from research.experiments.results import read_records
from research.experiments.runner import MEASURED, Runner
from research.experiments.study import jobs_of, load_study, run_folder

STUDY = """
name: planted
question: ''
base: base.yaml
seeds: {decisive: [1, 2], other: [1, 2]}
pilot: {seeds: [9], arms: [one, two, four]}
arms:
  one: {about: '', seeds: decisive}
  two: {about: '', seeds: decisive, set: {parallel.ep: 2}}
  four: {about: '', seeds: decisive, set: {parallel.ep: 4}}
"""


class Fake:
    running: dict["Fake", int]  # numbers of ranks of the running processes
    together: list[list[int]]  # these numbers at each start of a process

    def __init__(self, arguments: list[str], **_: Any) -> None:
        ranks = [int(each.removeprefix("parallel.ep=")) for each in arguments if each.startswith("parallel.ep=")]
        measures = "research.experiments.measure" in arguments
        self.looks, self.folder = 0, Path(arguments[4]) if measures else None
        Fake.running[self] = 1 if measures else (*ranks, 1)[0]
        Fake.together.append(sorted(Fake.running.values()))

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < 3:
            return None
        Fake.running.pop(self, None)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MEASURED).write_text(json.dumps({"loss": {"all": 1.0}}))
        return 0


@pytest.fixture
def study_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fake, "running", {}, raising=False)
    monkeypatch.setattr(Fake, "together", [], raising=False)
    monkeypatch.setattr("subprocess.Popen", Fake)
    monkeypatch.setattr(runner, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(runner, "code_of_now", lambda: {"commit": "c0ffee", "changed": False})
    Path("base.yaml").write_text("run: {name: x}\n")
    Path("planted.yaml").write_text(STUDY)
    return Path("planted.yaml")


def run(path: Path, *, side_by_side: int) -> list[list[int]]:
    """Returns the numbers of ranks that ran together, at each start."""
    study = load_study(path)
    made = Runner(path, study, pilot=False, rules=None, side_by_side=side_by_side, stop_requested=lambda: False)
    made.run(jobs_of(study))
    assert len(read_records(Path(study.records) / "planted.jsonl.gz")) == 6
    assert run_folder(study, "four", 1, pilot=False).is_dir()
    return Fake.together


def test_a_run_of_several_ranks_counts_as_so_many(study_path: Path) -> None:
    together = run(study_path, side_by_side=2)
    assert [1, 1] in together, "runs of one rank are beside each other"
    assert [2] in together
    assert [4] in together, "more ranks than there is room for run alone"
    assert all(sum(each) <= 2 or each == [4] for each in together)


def test_more_room_has_more_ranks(study_path: Path) -> None:
    assert [1, 1, 2] in run(study_path, side_by_side=4)


def test_runs_of_a_seed_follow_each_other(study_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(study_path, side_by_side=1)
    started = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train")]
    assert started == [f"train {arm} seed {seed}" for seed in (1, 2) for arm in ("one", "two", "four")]
