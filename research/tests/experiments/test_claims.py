"""The table of claims lists every rule of the named experiments with the rule's verdict from the committed records."""

from pathlib import Path

import pytest

from moe_dist.errors import DataError
from research.experiments.claims import PAGE, write_claims

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_page_shows_what_the_records_say(tmp_path: Path) -> None:
    copy = tmp_path / "results.md"
    copy.write_text(PAGE.read_text())
    write_claims(copy)
    assert copy.read_text() == PAGE.read_text(), "python -m research.experiments NAME --report writes the table anew"


def test_a_page_without_the_comments_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(DataError, match="lacks <!-- begin claims NAME"):
        write_claims(page)
