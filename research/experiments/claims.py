"""Writes the table of claims in docs/results_all.md: each rule of some experiments, with its verdict and its effect. The
page names the experiments in the comment `<!-- begin claims NAME NAME ... -->`."""

import re
from collections.abc import Sequence
from pathlib import Path

from moe_dist.errors import DataError
from moe_dist.runtime.files import write_atomically
from research.experiments.results import read_records, results_path
from research.experiments.study import FOLDER, Study, find_file, load_study
from research.experiments.verdict_figure import unit_of
from research.experiments.verdicts import Verdict, judge

PAGE = Path("docs/results_all.md")
TABLE = re.compile(r"(<!-- begin claims ((?:[\w-]+ )+)-->\n).*?(<!-- end claims -->)", re.DOTALL)


def write_claims(page: Path = PAGE) -> None:
    """Writes the table again from the records.

    Raises:
        DataError: the page has no comments before and after the table.
    """
    text = page.read_text()
    found = TABLE.search(text)
    if found is None:
        raise DataError(f"{page}: lacks <!-- begin claims NAME ... --> and <!-- end claims -->; take it from git")
    studies = [load_study(find_file(FOLDER / f"{name}.yaml")) for name in found[2].split()]
    rows = [row for study in studies for row in _rows(study)]
    heads = ["experiment", "claim", "verdict", "difference [one-sided bounds]", "judged by", "unit", "seeds"]
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join("| " + " | ".join(each) + " |" for each in lines)
    write_atomically(page, text[: found.start()] + f"{found[1]}{table}\n{found[3]}" + text[found.end() :])


def _rows(study: Study) -> Sequence[Sequence[str]]:
    link = f"[{study.name}](../research/records/reproductions/{study.name}.md)"
    judged = {"bound": f"upper bound, {100 * study.confidence:.3g} %", "mean": "mean"}
    rows = []
    for each in _verdicts(study):
        effect, unit, seeds = _effect(each)
        rows.append([link, each.rule.claim, f"**{outcome_of(each)}**", effect, judged[each.rule.by], unit, seeds])
    return rows


def outcome_of(verdict: Verdict) -> str:
    """Returns `verdict.outcome`. Adds that the claim is refuted if even the lower bound is above the margin."""
    refuted = verdict.outcome == "fail" and verdict.paired is not None and verdict.paired.lower > verdict.rule.margin
    return "fail, refuted" if refuted else verdict.outcome


def _verdicts(study: Study) -> list[Verdict]:
    return judge(study, read_records(results_path(study, pilot=False)))


def _effect(verdict: Verdict) -> tuple[str, str, str]:
    found = verdict.paired
    if found is None:
        return verdict.reason, "-", "-"
    sign = f"{found.mean:+.4g} [{found.lower:+.4g}, {found.upper:+.4g}]"
    margin = f"; margin {verdict.rule.margin:g}" if verdict.rule.margin else ""
    reason = f" ({verdict.reason})" if verdict.reason else ""
    return f"{sign}{margin}{reason}", unit_of(verdict.rule) or "-", str(found.n)
