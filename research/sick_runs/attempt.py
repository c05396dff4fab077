"""Runs one case, and reads what its console, `moe-dist status` and its report say."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from research.sick_runs.cases import HERE, STEPS, Case
from research.sick_runs.rank import FAULT

SHARED = "tokens a second fell"  # true of a machine that others use, too, and no symptom of a fault but a slow one
WITHIN = 60  # steps from a fault's effect until a rule must have named it
LIMIT_SECONDS = 420
LAUNCH = (
    "import sys, typer; from pathlib import Path; from launchers.local import launch; "
    "from moe_dist.runtime.command_line import reports_errors\n"
    "try:\n"
    "    with reports_errors():\n"
    "        sys.exit(launch(Path(sys.argv[1]), sys.argv[2:], program=('-m', 'research.sick_runs.rank')))\n"
    "except typer.Exit as end:\n"
    "    sys.exit(end.exit_code)"
)
HINT = re.compile(r"^(?:hint|warning) \(step (\d+)\): (.*)")
USUAL = re.compile(
    r"^(step \d+/|evaluation after|Model:|Experts:|Ranks:|Data:|Follow it|Charts|Placement|Run |records |done|\d+ ranks)"
)


def judge(case: Case, out: Path) -> dict[str, Any]:
    """Runs a case in the folder `out` and returns its record."""
    folder = out / "runs" / case.key
    shutil.rmtree(folder, ignore_errors=True)
    if case.before:
        _run_before(case.before, out)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: sum(range(9999))"]) for _ in range(case.load)]
    try:
        if case.resume:
            console = _launch(case, out, "train.steps=60")[1]
            code, second = _launch(case, out)
            console += second
        else:
            code, console = _launch(case, out)
    finally:
        for each in busy:
            each.kill()
    if folder.exists():
        (folder / "console.txt").write_text(console)
    # The run's folder has the fault's name, which is no statement of the run.
    console, status, printed = (
        each.replace(f"{out}/", "").replace(case.key, "RUN")
        for each in (console, _command("status", str(folder)), _command("report", str(folder)))
    )
    said = {
        "console": statements(console, code),
        "status": _status(status),
        "report": _report(printed, folder / "report.html"),
    }
    record = {"exit": code, "what": case.what, **said, "losses": _losses(folder / "metrics.jsonl")}
    return record if not case.fault else {**record, **verdict(case, said, code, folder)}


def _run_before(base: str, out: Path) -> None:
    folder = out / "runs" / f"before-{base}"
    if not (folder / "summary.txt").exists():
        case = Case(f"before-{base}", "", base if base != "tiny" else "moe_dist")
        assert _launch(case, out)[0] == 0, f"the base run {folder} failed"


def _launch(case: Case, out: Path, *more: str) -> tuple[int, str]:
    """Returns the exit code and the console of a launch."""
    command = [sys.executable, "-c", LAUNCH, str(HERE / "bases" / f"{case.base}.yaml"), *case.overrides(out), *more]
    environment = {**os.environ, "COLUMNS": "4000", "PYTHONWARNINGS": "ignore", FAULT: case.fault}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def _command(*words: str) -> str:
    environment = {**os.environ, "COLUMNS": "4000", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "moe_dist", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS).stdout


def statements(console: str, code: int) -> list[str]:
    """Returns the hints of a console, lines with words of failure, and all unusual lines if the run failed."""
    found, body = [], console.splitlines()
    for line in body:
        words = re.search(r"\b(warning|error|fail|refused|diverge|drift|differ)", line, re.IGNORECASE)
        if HINT.match(line) or ((code or words) and line.strip() and not USUAL.match(line) and "━" not in line):
            found.append(" ".join(line.split())[:1500])
    return list(dict.fromkeys(found))[:60]


def _status(text: str) -> list[str]:
    """Returns the state and the entries below the bar, each on one line: warnings, errors and failed attempts."""
    lines = [" ".join(line.split()) for line in re.sub(r"\n {6,}(?!\d+ )", " ", text).splitlines()]
    return [
        line for line in lines if line and not re.match(r"━|(step|pace|checkpoint|start|loss) |\d+ local .* done$", line)
    ]


def _report(printed: str, page: Path) -> list[str]:
    """Returns the report's verdicts, and its findings before the facts of routing, if they are also on the page."""
    text = page.read_text() if page.exists() else ""
    heads = re.findall(r"<li[^>]*>(.*?)</li>", text.partition('<ul class="heads">')[2].partition("</ul>")[0])
    verdicts = [" ".join(html.unescape(re.sub("<[^>]+>", " ", each)).split()) for each in heads]
    shown = " ".join(html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)).split())
    found = []
    for line in printed.splitlines():
        line = " ".join(line.removeprefix("- ").split())
        if line.startswith("Busiest expert"):
            break
        if line and line.rstrip(".")[:60] in shown:
            found.append(line)
    return found + verdicts


def _losses(file: Path) -> dict[str, Any]:
    """Returns the loss of the first and last steps and the last held-out losses."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [row for row in rows if row.get("kind") == "step"]
    held = [row["losses"] for row in rows if row.get("kind") == "evaluation"]
    scalars = [row["scalars"].get("loss/total") for row in (steps[:1] + steps[-1:])]
    return {"train": scalars, "steps": len(steps), "held_out": held[-1] if held else None}


def verdict(case: Case, said: dict[str, list[str]], code: int, folder: Path) -> dict[str, Any]:
    """Returns by the rule of `research.sick_runs` whether the fault is named, where, and at which step first."""
    where = [place for place, lines in said.items() if any(_names(case, line) for line in lines)]
    named = [line for line in said["console"] if _names(case, line)]
    steps = [int(match[1]) for line in named if (match := HINT.match(line))]
    first = min(steps, default=None)
    if first is None and named and code:
        first = _losses(folder / "metrics.jsonl")["steps"]
    latest = max(case.effect + WITHIN, -(-(case.effect + 1) // 30) * 30)
    refused = bool(code and named and not (folder / "metrics.jsonl").exists())
    hints = [line for line in said["console"] if HINT.match(line) and (SHARED not in line or case.fault == "slow-loader")]
    if refused or (len(where) == len(said) and first is not None and first <= min(latest, STEPS)):
        result = "named"
    elif where:
        result = "partly"
    else:
        result = "symptom" if hints or code else "silent"
    return {"verdict": result, "named_in": where, "first": first, "effect": case.effect}


def _names(case: Case, line: str) -> bool:
    return all(re.search(pattern, line, re.IGNORECASE) for pattern in case.cause)
