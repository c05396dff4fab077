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


def test_a_claim_has_its_verdict_and_effect(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n<!-- begin claims adamoe-held -->\nold\n<!-- end claims -->\nAfter.\n")
    write_claims(page)
    lines = page.read_text().splitlines()
    held = "[adamoe-held](../research/records/reproductions/adamoe-held.md)"
    effect = "+0.006524 [+0.006069, +0.006979]; margin 0.02 | upper bound, 95 % | nats | 5"
    row = f"| {held} | AdaMoE (m8k3) is not worse than top-2 | **pass** | {effect} |"
    assert row in lines
    assert "old" not in lines
    assert lines[-1] == "After."


def test_a_claim_is_refuted_where_the_lower_bound_is_above_the_margin_too(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("<!-- begin claims mole -->\n<!-- end claims -->\n")
    write_claims(page)
    verdicts = {line.split(" | ")[1]: line.split(" | ")[2] for line in page.read_text().splitlines()[3:-1]}
    assert verdicts["MoLE answers better than LoRA with twice the unique samples"] == "**fail, refuted**"
    assert {*verdicts.values()} == {"**fail**", "**fail, refuted**", "**pass**"}


def test_a_page_without_the_comments_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(DataError, match="lacks <!-- begin claims NAME"):
        write_claims(page)
