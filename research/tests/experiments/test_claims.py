"""The tables of docs/results_all.md (every rule) and docs/results.md (the claims that count) agree with the records."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dist.errors import DataError
from research.experiments import claims, summary

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


TABLES = [(claims.PAGE, claims.write_claims, "claims NAME"), (summary.PAGE, summary.write_summary, "summary")]


@pytest.mark.parametrize(("page", "write", "name"), TABLES)
def test_the_page_shows_what_the_records_say(page: Path, write: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    copy = tmp_path / page.name
    copy.write_text(page.read_text())
    write(copy)
    assert copy.read_text() == page.read_text(), "python -m research.experiments.summary or NAME --report writes it anew"
    copy.write_text("# Results\n")
    with pytest.raises(DataError, match=f"<!-- begin {name}"):
        write(copy)
