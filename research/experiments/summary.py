"""Writes the table and the figure of docs/results.md from the records: python -m research.experiments.summary

research/records/summary.yaml lists the rows. A row is a rule that an experiment registered, or a comparison of the same
records that was made after the runs (*post hoc*). Also prints the p-values of the comparison of methods.
"""

import json
import math
import re
from pathlib import Path
from typing import cast

from pydantic import PositiveInt, TypeAdapter

from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import DataError
from moe_dist.runtime.files import write_atomically
from research.experiments.claims import outcome_of
from research.experiments.load_controls import SUFFIX
from research.experiments.methods import METHODS
from research.experiments.report import table
from research.experiments.results import read_records, results_path
from research.experiments.rules import ArmValue, Part, ValueRule
from research.experiments.study import FOLDER, Study, find_file, load_study
from research.experiments.summary_figure import draw_summary
from research.experiments.verdict_figure import unit_of
from research.experiments.verdicts import Paired, Records, judge, paired, value_of

PAGE = Path("docs/results.md")
ROWS = Path("research/records/summary.yaml")
COMPARISONS = Path("research/records/comparisons")
FIGURE = Path("research/records/summary.svg")
MOST = 20  # number of rows that a reader of two minutes can take in
TABLE = re.compile(r"(<!-- begin summary -->\n).*?(<!-- end summary -->)", re.DOTALL)


class Row(Part):
    """A row of the table: a registered rule (`rule` is its claim), or a comparison (`post_hoc`).

    Attributes:
        claim: The claim in plain words.
        experiment: Name of the experiment, or of the comparison of methods.
        among: Number of differences for which the interval of `post_hoc` is corrected (Bonferroni).
        other: If given, `post_hoc.higher` is computed from the records of this comparison, not of `experiment`.
        verdict: The verdict on `post_hoc`. A rule's verdict comes from the records.
        but: A limitation of the verdict.
    """

    claim: str
    experiment: str
    rule: str = ""
    post_hoc: ValueRule | None = None
    among: PositiveInt = 1
    other: str = ""
    verdict: str = ""
    but: str = ""


def write_summary(page: Path = PAGE) -> None:
    """Writes the table again from the records.

    Raises:
        DataError: the page has no comments before and after the table, the table is too long, or a row names no rule.
    """
    text = page.read_text()
    found = TABLE.search(text)
    rows = read_rows()
    if found is None or len(rows) > MOST:
        raise DataError(
            f"{page} and {ROWS}: the page needs <!-- begin summary --> and <!-- end summary -->, and at most {MOST} rows, "
            f"has {len(rows)}; take the page from git, or move rows to docs/results_all.md"
        )
    heads = ["claim", "verdict", "effect [bounds]", "experiment"]
    lines = table(heads, [_cells(row) for row in rows])
    write_atomically(page, text[: found.start()] + found[1] + "\n".join(lines) + f"\n{found[2]}" + text[found.end() :])


def read_rows() -> list[Row]:
    """Reads ROWS. Raises DataError if the file is no YAML."""
    values, problems = load_yaml(ROWS.read_text())
    if problems:
        raise DataError(f"{ROWS}: {'; '.join(problems)}; take the file from git")
    return TypeAdapter(list[Row]).validate_json(json.dumps(values))


def _cells(row: Row) -> list[str]:
    study, records = _load(row.experiment)
    if row.post_hoc is None:
        verdicts = [each for each in judge(study, records) if each.rule.claim == row.rule]
        if len(verdicts) != 1 or verdicts[0].paired is None:
            raise DataError(f"{ROWS}: {row.experiment} has no rule {row.rule!r} with a difference; name a rule's claim")
        rule, found, verdict = verdicts[0].rule, verdicts[0].paired, outcome_of(verdicts[0])
    else:
        rule, verdict = row.post_hoc, row.verdict
        others = _load(row.other)[1] if row.other else records
        found = paired(_post_hoc(row.post_hoc, records, others), 1.0 - 0.025 / row.among)
    text = f"**{verdict}**" + (f": {row.but}" if row.but else "")
    return [row.claim, text, _effect(rule, found), _link(row.experiment)]


def _post_hoc(rule: ValueRule, records: Records, others: Records) -> list[float]:
    """Returns the difference for each seed that all arms have. `lower` is read from `records`, `higher` from `others`."""
    sides = (records, others)
    seeds = set.intersection(*({seed for name, seed in each if name == arm} for arm in rule.arms for each in sides))
    pairs = [(value_of(rule.lower, records, seed), value_of(rule.higher, others, seed)) for seed in sorted(seeds)]
    return [one - other for one, other in pairs if one is not None and other is not None]


def _load(name: str) -> tuple[Study, Records]:
    comparison = COMPARISONS / name / "study.yaml"
    study = load_study(comparison if comparison.is_file() else find_file(FOLDER / f"{name}.yaml"))
    return study, read_records(results_path(study, pilot=False))


def _link(name: str) -> str:
    if name.startswith("budget-"):
        return f"[{name}](method-comparison.md#{name.replace('.', '')})"
    return f"[{name}](../research/records/reproductions/{name}.md)"


def _effect(rule: ValueRule, found: Paired) -> str:
    """Describes a difference and its bounds: a log ratio as the ratio, and a share in percentage points."""
    unit, values = unit_of(rule), (found.mean, found.lower, found.upper)
    if unit.startswith("ln of a ratio of "):
        mean, lower, upper = (f"{math.exp(each):.3f}" for each in values)
        unit = f"of the {unit.removeprefix('ln of a ratio of ')}"
    elif unit.startswith("share of "):
        mean, lower, upper = (f"{100.0 * each:+.1f}" for each in values)
        unit = f"points of {unit.removeprefix('share of ')}"
    else:
        mean, lower, upper = (f"{each:+.4f}" for each in values)
    return f"{mean} [{lower}, {upper}] {unit}"


def p_values() -> list[tuple[float, str]]:
    """Returns the two-sided p-value of each method's difference from `fixed` and from its control, as in the tables of the
    comparison. Each p-value is multiplied by the number of differences (Bonferroni)."""
    from scipy.stats import ttest_1samp

    found = []
    for budget in ("budget-1.5", "budget-2.5"):
        study, records = _load(budget)
        pairs = [(arm, of) for arm in METHODS for of in ("fixed", f"{arm}{SUFFIX}")]
        for arm, of in pairs:
            if arm == "fixed" or not {arm, of} <= set(study.arms):
                continue
            for metric in ("loss.all", "accuracy.all"):
                rule = ValueRule(claim="", lower=ArmValue(arm=arm, metric=metric), higher=ArmValue(arm=of, metric=metric))
                _, p = cast(tuple[float, float], ttest_1samp(_post_hoc(rule, records, records), 0.0))
                found.append((p, f"{budget} {arm} less {of}, {metric}"))
    return sorted((p * len(found), what) for p, what in found)


if __name__ == "__main__":
    write_summary()
    draw_summary(_load("adamoe-2")[1], {name: _load(name)[1] for name in ("budget-1.5", "budget-2.5")}, FIGURE)
    print("\n".join(f"p x number {p:8.3f}  {what}" for p, what in p_values()))
