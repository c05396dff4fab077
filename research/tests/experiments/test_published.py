"""Pages and tables in research/records agree with the records there, and docs/method-comparison.md shows these tables."""

from pathlib import Path

import pytest

from research.experiments import report
from research.experiments.comparison import Comparison, table_text
from research.experiments.load_controls import SUFFIX
from research.experiments.results import read_header, read_records, results_path
from research.experiments.study import FOLDER, find_file, fingerprint, load_study

ROOT = Path("research/records/comparisons")
REPOSITORY = Path(__file__).parents[3]
STUDIES = REPOSITORY / "research" / "records" / "reproductions"
# The file or the base of each of these studies changed after the study's runs, so no further run may be added.
CLOSED = {"adamoe", "adamoe-held", "mole", "moma", "moma-narrow"}


@pytest.mark.parametrize("name", ["budget-1.5", "budget-2.5"])
def test_tables_say_what_the_records_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    study = load_study(ROOT / name / "study.yaml")
    asked = Comparison(
        name=name,
        budget=float(name.removeprefix("budget-")),
        methods=tuple(arm for arm in study.arms if not arm.endswith(SUFFIX)),
        seeds=study.seeds.decisive,
        base=str(study.base),
        overrides={},
        root=ROOT,
        controls=any(arm.endswith(SUFFIX) for arm in study.arms),
    )
    assert len(asked.methods) >= 8
    assert len(asked.seeds) == 3
    text = table_text(asked, study, read_records(results_path(study, pilot=False)))
    assert (ROOT / name / "table.md").read_text() == text, "--report writes the table anew"
    assert text.split("\n\n")[1] in Path("docs/method-comparison.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name.removesuffix(".jsonl.gz") for path in STUDIES.glob("*.jsonl.gz")))
def test_pages_say_what_the_records_say(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compares all tables. It compares no figures, and no sentences about code versions, which need git's history."""
    monkeypatch.chdir(REPOSITORY)
    path = find_file(FOLDER / f"{name}.yaml")
    study = load_study(path)
    header = read_header(results_path(study, pilot=False))
    assert header is not None
    assert (header["fingerprint"] != fingerprint(path, study)) is (name in CLOSED), "its records are of other rules"
    monkeypatch.setattr(report, "draw", lambda *_: [])
    monkeypatch.setattr(report, "draw_verdicts", lambda *_: [])
    monkeypatch.setattr(report, "tell_versions", lambda *_: "")
    report.write_report(study, page=tmp_path / "page.md")
    published = (STUDIES / f"{name}.md").read_text().partition(f"<!-- begin {name} {header['fingerprint']} -->")[2]
    found, expected = (
        [line for line in text.partition("<!-- end")[0].splitlines() if line.startswith(("|", "#"))]
        for text in ((tmp_path / "page.md").read_text(), published)
    )
    assert len(found) > 10
    assert found == expected
