"""The rules of a study must be committed before its first results. The records contain the rules' commit and results."""

import gzip
import os
import subprocess
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError, DataError
from research.experiments.report import write_report
from research.experiments.results import add_record, check_rules, code_of_now, make_header, read_records
from research.experiments.study import Study, fingerprint, jobs_of, load_study
from tests.support.messages import refused

STUDY = """
name: planted
question: Is a below b?
base: base.yaml
seeds: {decisive: [1, 2], other: [1, 2]}
pilot: {seeds: [9], found: lr 0.1, arms: [b], variants: {a: {fast: {optimizer.lr: 0.01}}}}
arms:
  a: {about: first}
  b: {about: second, after: a}
rules:
  - {claim: b is below a, lower: {arm: b, metric: loss.all}, higher: {arm: a, metric: loss.all}}
"""


def git(*arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, env={**os.environ, **identity})
    return done.stdout.strip()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Study]:
    """Returns a study committed to a new repository, and makes this the working directory."""
    monkeypatch.chdir(tmp_path)
    path = Path("planted.yaml")
    path.write_text(STUDY)
    Path("base.yaml").write_text("run: {name: x}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "rules")
    return path, load_study(path)


def record(arm: str, seed: int, loss: float) -> dict:
    part = {name: {"tokens": 1, "load": 2.0} for name in ("text", "image")}
    return {
        "arm": arm, "seed": seed, "code": {"commit": "c0ffee", "changed": False}, "tokens": 10, "seconds": 2.0,
        "flops": 1e12, "loss": {"all": loss}, "load": {"all": 1.5, "by_layer": [1.0, 2.0], "idle": 0.0},
        "load_by_loss": [{"from": 0.0, "to": 1.0, **part}], "curve": [], "probes": {},
        "wire": dict.fromkeys(("rows_remote", "rows_per_pair", "rows_topk", "rows_same_active", "rows_null_remapped"), 1.0),
    }  # fmt: skip


def test_rules_without_a_pilot_are_refused(study: tuple[Path, Study]) -> None:
    path, _ = study
    path.write_text(STUDY.replace("found: lr 0.1, ", ""))
    with refused(ConfigError, "pilot.found"):
        check_rules(Path("r.jsonl.gz"), path, load_study(path))


@pytest.mark.parametrize("changed", ["planted.yaml", "base.yaml"])
def test_rules_are_committed_and_stay_as_at_the_first_results(study: tuple[Path, Study], changed: str) -> None:
    path, rules = study
    results = Path("r.jsonl.gz")
    add_record(results, make_header(path, rules, check_rules(results, path, rules)), record("a", 1, 1.0))
    assert len(check_rules(results, path, rules)) == 40
    git("rm", "-q", "--cached", changed)
    with refused(ConfigError):
        check_rules(Path("other.jsonl.gz"), path, rules)
    git("add", changed)
    with Path(changed).open("a") as stream:
        stream.write("# more\n")
    with refused(ConfigError):
        check_rules(Path("other.jsonl.gz"), path, rules)
    git("commit", "-qam", "other rules")
    assert check_rules(Path("other.jsonl.gz"), path, rules)
    with refused(ConfigError):
        check_rules(results, path, rules)


def test_changed_code_is_refused_where_records_must_be_rebuilt(
    study: tuple[Path, Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rules = study
    strict = rules.model_copy(update={"committed_code": True})
    monkeypatch.setattr("research.experiments.results.code_of_now", lambda: {"commit": "c0ffee", "changed": True})
    assert check_rules(Path("r.jsonl.gz"), path, rules)
    with refused(ConfigError, "committed_code"):
        check_rules(Path("r.jsonl.gz"), path, strict)
    monkeypatch.setattr("research.experiments.results.code_of_now", lambda: {"commit": "c0ffee", "changed": False})
    assert check_rules(Path("r.jsonl.gz"), path, strict)


def test_records_come_back_and_a_second_of_the_same_run_takes_its_place(study: tuple[Path, Study]) -> None:
    path, rules = study
    results, header = Path("deep/r.jsonl.gz"), make_header(path, rules, "abc")
    for loss in (1.0, 2.0):
        add_record(results, header, record("a", 1, loss))
    add_record(results, header, record("b", 1, 3.0))
    assert {key: each["loss"]["all"] for key, each in read_records(results).items()} == {("a", 1): 2.0, ("b", 1): 3.0}
    whole = results.read_bytes()
    results.write_bytes(whole + gzip.compress(b"{torn\n"))
    with refused(DataError):
        read_records(results)
    results.write_bytes(whole[:-20])
    with refused(DataError):
        read_records(results)


def test_pilot_has_its_arms_with_what_they_need_and_variants(study: tuple[Path, Study]) -> None:
    _, rules = study
    assert [(job.label, job.seed) for job in jobs_of(rules, pilot=True)] == [("a", 9), ("a~fast", 9), ("b", 9)]
    assert [(job.label, job.seed) for job in jobs_of(rules)] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


AFTER = "  b: {about: second, after: a}"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (AFTER, "  b: {about: second, after: c}", "c: no such arm"),
        (AFTER, "  b: {about: second, after: b}", "which must stand before it"),
        (AFTER, "  b: {about: second, seeds: decisive, after: a}", "has seeds that a lacks"),
        (AFTER, "  b: {about: second, later: a}", "Extra inputs"),
        ("pilot: {seeds: [9]", "pilot: {seeds: [2]", "pilot.seeds"),
        ("a: {about: first}", "a: {about: first, asks: [oracle]}", "arms.a.asks"),
    ],
)
def test_a_study_that_cannot_be_is_refused(study: tuple[Path, Study], old: str, new: str, fault: str) -> None:
    path, _ = study
    path.write_text(STUDY.replace("decisive: [1, 2]", "decisive: [1, 2, 3]").replace(old, new))
    with refused(ConfigError, fault):
        load_study(path)


def test_report_is_written_whatever_it_says_and_an_earlier_attempt_stays(study: tuple[Path, Study]) -> None:
    path, rules = study
    results, page = Path("r.jsonl.gz"), Path("page.md")
    page.write_text("# Reproductions\n\nText.\n")
    header = make_header(path, rules, "a" * 40)
    for arm, load, losses in (("a", 1.5, (1.0, 1.1)), ("b", 1.25, (1.2, 1.3))):
        for seed, loss in enumerate(losses, 1):
            mine = record(arm, seed, loss)
            add_record(results, header, {**mine, "load": {**mine["load"], "all": load + seed / 10}})
    assert write_report(rules, page=page, results=results).startswith("fail: b is below a +0.2000")
    once = page.read_text()
    write_report(rules, page=page, results=results)
    assert page.read_text() == once, "written anew, not twice"
    assert once.startswith("# Reproductions\n\nText.\n")
    assert "**fail**" in once
    for name in ("loss_over_load", "verdicts"):
        assert Path(f"planted_{name}.svg").stat().st_size > 1000
    assert "b is below a" in Path("planted_verdicts.svg").read_text()
    results.rename("old.jsonl.gz")
    add_record(results, {**header, "fingerprint": "other"}, record("a", 1, 1.0))
    text = write_report(rules, page=page, results=results)
    assert text.startswith("not testable here: b is below a (no record yet of")
    assert page.read_text().startswith(once.rstrip()), "the earlier attempt stays"


def test_a_reason_found_after_the_runs_leaves_the_rules_and_the_numbers(study: tuple[Path, Study]) -> None:
    path, rules = study
    path.write_text(STUDY.replace("base: base.yaml", "base: base.yaml\nrecords: ."))
    before = fingerprint(path, rules := load_study(path))
    for arm, losses in (("a", (1.0, 1.1)), ("b", (1.2, 1.3))):
        for seed, loss in enumerate(losses, 1):
            add_record(Path("planted.jsonl.gz"), make_header(path, rules, "a" * 40), record(arm, seed, loss))
    assert write_report(rules).startswith("fail: b is below a +0.2000")
    Path("additions.yaml").write_text("planted: {not_testable: 'gate of 3, has 2', names: {b: below}}\n")
    rules = load_study(path)
    assert fingerprint(path, rules) == before
    assert write_report(rules).startswith("not testable here: b is below a +0.2000")
    assert "n = 2; asked: upper < 0 (gate of 3, has 2) | **not testable here** |" in Path("planted.md").read_text()
    assert "not testable here" in Path("planted_verdicts.svg").read_text()
    for text in ("planted: [", "- planted", "planted: {name: x}", "planted: {names: {c: x}}"):
        Path("additions.yaml").write_text(text)
        with refused(ConfigError, "additions.yaml"):
            load_study(path)


@pytest.mark.parametrize(
    ("files", "new", "changed"),
    [
        ((), "notes.txt", False),
        (("docs/results.md", "research/records/reproductions/roma.jsonl.gz"), "docs/pictures.py", False),
        ((), "research/records/comparisons/other/study.yaml", False),
        (("docs/a.md", "moe_dist/b.py"), "notes.txt", True),
        ((), "tools/new.py", True),
    ],
)
def test_documents_are_no_change_of_the_code(
    monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], new: str, changed: bool
) -> None:
    diff = "".join(f"diff --git a/{file} b/{file}\n--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-1\n+2\n" for file in files)
    monkeypatch.setattr("research.experiments.results.code_state", lambda _: ("c0ffee", diff.encode(), [new]))
    assert code_of_now() == {"commit": "c0ffee", "changed": changed}


@pytest.mark.parametrize("names", ["a/docs/a.py b/moe_dist/a.py", '"a/moe_dist/\\303.py" "b/moe_dist/\\303.py"'])
def test_what_may_be_code_is_a_change(monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    diff = f"diff --git {names}\n"
    monkeypatch.setattr("research.experiments.results.code_state", lambda _: ("c0ffee", diff.encode(), []))
    assert code_of_now()["changed"]
