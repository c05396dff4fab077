"""The tables in research/records/comparisons agree with the records there, and docs/results.md shows the same tables."""

from pathlib import Path

import pytest

from research.experiments.comparison import Comparison, table_text
from research.experiments.load_controls import SUFFIX
from research.experiments.results import read_records, results_path
from research.experiments.study import load_study

ROOT = Path("research/records/comparisons")
REPOSITORY = Path(__file__).parents[3]


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
    assert text.split("\n\n")[1] in Path("docs/results.md").read_text()
