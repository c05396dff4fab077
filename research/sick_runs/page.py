"""Writes the table of the records, as Markdown."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from research.sick_runs.attempt import HINT
from research.sick_runs.cases import HERE, Case

HEAD = """# Planted faults of training

25 faults and 12 healthy runs, planned before the first run by an author who had read no rule
([plan](../../sick_runs/plan.yaml), [rule](../../sick_runs/__init__.py)). `python -m research.sick_runs` runs the cases that
have no JSON file here, and writes this table. `named`: console, status and report name the cause in time. `partly`: not all
of them, or too late. `symptom`: a hint or an error, but none with the cause. `silent`: nothing.
"""
SINCE = """# The same faults, by rules made since

The rules that these runs had were made after [the first table](../README.md), and because of it, so that they are not
blind. Faults and healthy runs that no rule was made for are needed to judge them. `bf16-moments` is absent: it has no key.
`python -m research.sick_runs --records research/records/sick_runs/since` runs the cases that have no JSON file here.
"""


def page(known: list[Case], records: Path) -> str:
    """Returns the tables of the cases that have a record in the folder `records`."""
    found = {each.key: json.loads(file.read_text()) for each in known if (file := records / f"{each.key}.json").exists()}
    judged = yaml.safe_load((HERE / "judged.yaml").read_text()) or {}
    faults = [each for each in known if each.fault and each.key in found]
    first = records.name != "since"
    lines = [
        HEAD if first else SINCE,
        *_totals(faults, found),
        "",
        "| fault | engine | exit | verdict | first step | named in | first hint |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for each in faults:
        record, engine = found[each.key], each.key.removeprefix(f"{each.fault}-")
        step = (
            f"{record['first']} (effect {record['effect']})"
            if record["first"] is not None
            else f"(effect {record['effect']})"
        )
        places = ", ".join(record["named_in"]) or "-"
        cells = (each.fault, engine, record["exit"], f"**{record['verdict']}**", step, places, _first(record))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## Healthy runs", "", "| run | exit | hint | judged |", "|---|---|---|---|"]
    for each in known:
        if not each.fault and each.key in found:
            hints = hints_of(found[each.key]) or ["none"]
            for hint in hints:
                lines.append(
                    f"| {each.key} | {found[each.key]['exit']} | {_cell(hint)} | {_judged(judged, each.key, hint)} |"
                )
    missing = [each.key for each in known if each.key not in found]
    lines += ["", f"Not run yet: {', '.join(missing) or 'none'}."]
    lines += ["", "## Remarks", "", *(f"- {each}" for each in judged.get("remarks", ()))] if first else []
    lines += ["", "## The faults", ""]
    lines += [
        f"- `{name}`: {what}" for name, what in dict.fromkeys((each.fault, each.what) for each in known if each.fault)
    ]
    return "\n".join(lines) + "\n"


def _totals(faults: list[Case], found: dict[str, Any]) -> list[str]:
    """Returns a line for each engine with the number of faults of each verdict."""
    lines = ["| engine | named | partly | symptom | silent |", "|---|---|---|---|---|"]
    for engine in dict.fromkeys(each.key.removeprefix(f"{each.fault}-") for each in faults):
        count = Counter(found[each.key]["verdict"] for each in faults if each.key == f"{each.fault}-{engine}")
        lines.append(f"| {engine} | {' | '.join(str(count[name]) for name in ('named', 'partly', 'symptom', 'silent'))} |")
    return lines


def hints_of(record: dict[str, Any]) -> list[str]:
    return [line for line in record["console"] if HINT.match(line)]


def _first(record: dict[str, Any]) -> str:
    hints = hints_of(record) or record["console"][:1]
    more = f" (and {len(hints) - 1} more)" if len(hints) > 1 else ""
    return _cell(hints[0]) + more if hints else "-"


def _judged(judged: dict[str, dict[str, str]], key: str, hint: str) -> str:
    if hint == "none":
        return "-"
    return next((verdict for part, verdict in judged.get(key, {}).items() if part in hint), "not judged yet")


def _cell(text: str) -> str:
    return text.replace("|", "/")[:220]
