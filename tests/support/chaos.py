"""Runs that fail many times, resume each time, and end with the bits of an undisturbed run.

    python -m tests.support.chaos --rounds 200          # make chaos ROUNDS=200; continues an interrupted one
    python -m tests.support.chaos --markdown            # the table of docs/reliability.md, from stored results

Runs campaigns (`tests.support.campaign`), every second one with asynchronous saves. Then kills all ranks of other runs at
random moments of a save.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.campaign import FAULTS, campaign, killed_while_saving
from tests.support.cells import EMPTY, FEASIBLE, KINDS, PHASES, Cell
from tests.support.site import RANKS, ROOT, STEPS, open_site

OUTCOMES = "outcomes.jsonl"


Reports = list[dict[str, Any]]  # of campaigns and of kills, as they are stored, one line each


def read(path: Path) -> Reports:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def faults_of(reports: Reports) -> list[dict[str, Any]]:
    return [fault for each in reports for fault in each["faults"] if "to_end" in fault]


def kills_of(reports: Reports) -> int:
    return sum(fault.get("kills", 0) for each in reports for fault in each["faults"])


def missing(reports: Reports) -> list[Cell]:
    hit = {(fault["phase"], fault["kind"]) for fault in faults_of(reports)}
    return [cell for cell in FEASIBLE if cell not in hit]


def chaos(rounds: int, folder: Path, *, seed: int, kills: int) -> Reports:
    """Runs campaigns until `rounds` faults have struck and every feasible cell has occurred, and then the kills. Continues
    with the stored reports, which have the first seed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OUTCOMES
    reports = read(path)
    with open_site(folder / "site") as site:
        while len(faults_of(reports)) < rounds or missing(reports) or kills_of(reports) < kills:
            number = reports[0]["seed"] + len(reports) if reports else seed
            for left in (
                *site.folder.glob(f"*-{number}.*"),
                *site.folder.glob(f"runs/*-{number}"),
                *site.runs.glob(f"*-{number}"),
            ):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            if len(faults_of(reports)) < rounds or missing(reports):
                count = min(FAULTS, max(rounds - len(faults_of(reports)), 10))
                wanted = missing(reports)[:count]
                report = campaign(site, number, wanted, asynchronous=len(reports) % 2 == 1, count=count)
            else:
                report = killed_while_saving(site, number, min(10, kills - kills_of(reports)))
            reports.append(asdict(report))
            with path.open("a") as stream:
                stream.write(json.dumps(reports[-1]) + "\n")
            verdict = "as it should" if not report.problems else "PROBLEMS:\n  " + "\n  ".join(report.problems)
            print(
                f"{time.strftime('%T')} seed {number}: {report.starts} starts, {report.seconds:.0f} s; "
                f"{len(faults_of(reports))} faults and {kills_of(reports)} kills so far, {len(missing(reports))} cells to "
                f"come; {verdict}",
                flush=True,
            )
    return reports


def markdown(reports: Reports) -> str:
    """Returns the table of docs/reliability.md."""
    counts, faults = {cell: 0 for cell in FEASIBLE}, faults_of(reports)
    for fault in faults:
        counts[Cell(fault["phase"], fault["kind"])] += 1
    notes = list(dict.fromkeys(EMPTY.values()))

    def entry(cell: Cell) -> str:
        return str(counts[cell]) if cell in counts else f"- ({notes.index(EMPTY[cell]) + 1})"

    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| {phase} | {' | '.join(entry(Cell(phase, kind)) for kind in KINDS)} |" for phase in PHASES]
    lines += ["", "; ".join(f"({number}) {note}" for number, note in enumerate(notes, start=1)) + "."]
    dead = sorted(fault["to_end"] for fault in faults if fault["kind"] in ("exception", "SIGKILL"))
    frozen = sorted(fault["to_end"] for fault in faults if fault["kind"] == "SIGSTOP")
    lines += [
        "",
        f"{len(faults)} faults in {len(reports)} runs of {STEPS} steps on {RANKS} ranks, first seed "
        f"{reports[0]['seed']}, and {kills_of(reports)} kills of all ranks while saving; {problems(reports)} problems. "
        f"From an exception or SIGKILL to the end of all ranks: {_median(dead)} s in the middle, "
        f"{max(dead, default=0):.1f} s at most; from SIGSTOP: {_median(frozen)} s and {max(frozen, default=0):.1f} s.",
    ]
    return "\n".join(lines)


def problems(reports: Reports) -> int:
    return sum(len(each["problems"]) for each in reports)


def _median(values: Sequence[float]) -> str:
    return f"{values[len(values) // 2]:.1f}" if values else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="Faults that must have struck.")
    parser.add_argument("--kills", type=int, default=50, help="Kills of all ranks while a checkpoint is written.")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "chaos", help="Where state and runs are kept.")
    parser.add_argument("--seed", type=int, default=None, help="Of the first campaign; default drawn anew.")
    parser.add_argument("--markdown", action="store_true", help="Print the table of what was recorded, and end.")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    os.nice(10)
    stored = options.folder / OUTCOMES
    reports = read(stored) if options.markdown else chaos(options.rounds, options.folder, seed=seed, kills=options.kills)
    print(markdown(reports) if reports else f"{stored}: no reports")
    return 1 if problems(reports) else 0


if __name__ == "__main__":
    sys.exit(main())
