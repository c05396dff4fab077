"""An experiment accepts only records of one version of the code. Its page lists the runs of each version."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import moe_dist
from moe_dist.config.load import load_config
from moe_dist.errors import ConfigError
from research.experiments import __main__ as command
from research.experiments.code_versions import check_same_code, tell_versions
from research.experiments.results import add_record, code_of_now, make_header, read_records, results_path
from research.experiments.runner import MEASURED, Runner
from research.experiments.study import Study, jobs_of, load_study, run_folder
from research.tests.experiments.test_records import git
from tests.support.messages import refused

STUDY = """
name: planted
question: ''
base: base.yaml
committed_code: true
seeds: {decisive: [1, 2], other: [1, 2]}
pilot: {seeds: [9], found: lr, arms: [a]}
arms:
  a: {about: '', seeds: decisive}
  b: {about: ''}
"""
FILES = ("moe_dist/__init__.py", "launchers/local.py", "research/experiments/measure.py", "tools/generate.py", "docs/a.md")
LOST = "f" * 40
RESEARCH = Path(__file__).parents[2]


def commit(*changed: str) -> str:
    """Commits a change of the files, and returns the commit."""
    for name in changed:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with Path(name).open("a") as stream:
            stream.write("# more\n")
    git("add", ".")
    git("commit", "-qm", "change")
    return git("rev-parse", "HEAD")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Returns a study in a new repository that replaces the code's repository and is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moe_dist, "__file__", str(tmp_path / FILES[0]))
    Path("planted.yaml").write_text(STUDY)
    Path("base.yaml").write_text("run: {name: x}\n")
    Path(".gitignore").write_text("runs/\nresearch/records/\n")
    git("init", "-q")
    commit(*FILES)
    return load_study(Path("planted.yaml"))


def records(*codes: tuple[str, int, dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(arm, seed): {"arm": arm, "seed": seed, "code": code} for arm, seed, code in codes}


def of(commit: str, *, changed: bool = False) -> dict[str, Any]:
    return {"commit": commit, "changed": changed}


@pytest.mark.parametrize(
    ("changed", "folder"),
    [
        ("moe_dist/__init__.py", "moe_dist"),
        ("launchers/new.py", "launchers"),
        ("research/experiments/measure.py", "research/experiments"),
        ("tools/generate.py", ""),
        ("docs/a.md", ""),
    ],
)
def test_code_that_differs_where_it_matters_is_refused(study: Study, changed: str, folder: str) -> None:
    old = git("rev-parse", "HEAD")
    made = records(("a", 1, code_of_now()))
    check_same_code(study, made)
    new = commit(changed)
    if not folder:
        check_same_code(study, made)
        return
    with refused(ConfigError, old, new, f"they differ in {folder}.", f"git worktree add FOLDER {old}", "another name"):
        check_same_code(study, made)
    git("checkout", "-q", old)
    check_same_code(study, made)


def test_a_record_of_changed_code_and_a_commit_are_two_versions(study: Study) -> None:
    now = code_of_now()
    with refused(ConfigError, now["commit"], "one of them has uncommitted changes"):
        check_same_code(study, records(("a", 1, {**now, "changed": not now["changed"]}), ("a", 2, now)))


def test_a_commit_that_is_lost_is_refused(study: Study) -> None:
    with refused(ConfigError, LOST, "lacks one of these commits"):
        check_same_code(study, records(("a", 1, code_of_now()), ("a", 2, of(LOST))))


@pytest.mark.parametrize(
    ("old", "now", "fits"),
    [("0.1.0", "0.1.0", True), (None, "0.1.0", True), ("0.1.0", "0.2.0", False), (None, "0.2.0", False)],
)
def test_without_git_the_versions_of_the_package_are_compared(
    study: Study, monkeypatch: pytest.MonkeyPatch, old: str | None, now: str, fits: bool
) -> None:
    monkeypatch.setattr("research.experiments.results.VERSION", now)
    monkeypatch.setattr("research.experiments.results.code_state", lambda _: (None, b"", []))
    assert code_of_now() == {"commit": None, "changed": False, "version": now}
    code = {"commit": None, "changed": False, **({"version": old} if old else {})}
    if fits:
        check_same_code(study, records(("a", 1, code)))
        return
    with refused(ConfigError, "moe_dist 0.1.0", "moe_dist 0.2.0", "install moe_dist 0.1.0"):
        check_same_code(study, records(("a", 1, code)))


def add(study: Study, path: Path, runs: Sequence[tuple[str, int]]) -> None:
    for arm, seed in runs:
        record = {"arm": arm, "seed": seed, "code": code_of_now(), "loss": {"all": 1.0}, "load": {"all": 1.0}}
        add_record(results_path(study, pilot=False), make_header(path, study, None), record)


class StartedError(Exception):
    """The replacement for the start of a process raises this error."""


def no_process(*_: Any, **__: Any) -> None:
    raise StartedError


def test_the_runner_keeps_no_record_of_other_code(study: Study) -> None:
    path = Path("planted.yaml")
    add(study, path, [("a", 1)])
    runner = Runner(path, study, False, None, 1, lambda: False, same_code=True)
    job = jobs_of(study)[1]
    folder = run_folder(study, job.label, job.seed, pilot=False)
    folder.mkdir(parents=True)
    (folder / MEASURED).write_text('{"loss": {"all": 1.0}}')
    commit(FILES[0])
    with pytest.raises(ConfigError):
        runner._keep(job)
    git("checkout", "-q", "HEAD^")
    runner._keep(job)
    assert set(read_records(results_path(study, pilot=False))) == {("a", 1), ("a", 2)}


def test_a_finished_experiment_is_not_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("planted.yaml")
    monkeypatch.setattr(Runner, "_launch", no_process)
    add(study, path, [(job.label, job.seed) for job in jobs_of(study)])
    commit(FILES[0])
    Runner(path, study, False, None, 1, lambda: False, same_code=True).run(jobs_of(study))


@pytest.mark.parametrize("committed", [True, False])
def test_experiments_of_committed_code_need_the_same_code(
    study: Study, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    path = Path("planted.yaml")
    monkeypatch.setattr(Runner, "_launch", no_process)
    monkeypatch.setattr(command, "check", lambda *_: None)
    monkeypatch.setattr(command, "config_of", lambda *_, **__: load_config(RESEARCH / "configs/reproduce/base.yaml"))
    study = study.model_copy(update={"committed_code": committed, "records": "docs"})
    add(study, path, [("a", 1)])
    commit(FILES[0])
    with pytest.raises(ConfigError if committed else StartedError):
        command._run(path, study, jobs_of(study), pilot=False, processes=2)
    with pytest.raises(StartedError):  # a pilot's records are never judged
        Runner(path, study, True, None, 1, lambda: False, same_code=True).run(jobs_of(study, pilot=True))


def test_a_page_tells_which_runs_are_of_which_version(study: Study) -> None:
    old = git("rev-parse", "HEAD")
    same = commit("docs/a.md")
    assert tell_versions(study, records(("a", 1, of(old)), ("b", 1, of(same)))) == ""
    new = commit(FILES[0])
    told = tell_versions(study, records(("b", 1, of(new)), ("a", 2, of(old)), ("a", 1, of(old))))
    assert told == f"The code is not the same in all runs: `{old[:12]}` made 2 runs; `{new[:12]}` made `b` (seed 1)."
    told = tell_versions(study, records(("b", 1, of(old)), ("a", 2, of(LOST)), ("a", 1, of(old))))
    lost = f"`{LOST[:12]}`, which this repository lacks, made `a` (seed 2)"
    assert told == f"The code may not be the same in all runs: `{old[:12]}` made 2 runs; {lost}."
