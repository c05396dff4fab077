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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.campaign import FAULTS, Report, campaign, killed_while_saving
from tests.support.cells import EMPTY, FEASIBLE, KINDS, PHASES, Cell
from tests.support.site import RANKS, ROOT, STEPS, Site, open_site


@dataclass
class State:
    """The results of `make chaos` so far, in a file that is replaced after each campaign."""

    path: Path
    seed: int
    campaigns: list[dict[str, Any]] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, seed: int) -> "State":
        if not path.exists():
            return cls(path, seed)
        values = json.loads(path.read_text())
        return cls(path, values["seed"], values["campaigns"], values["kills"])

    def save(self) -> None:
        new = self.path.with_suffix(".new")
        values = {"seed": self.seed, "campaigns": self.campaigns, "kills": self.kills}
        new.write_text(json.dumps(values, indent=1) + "\n")
        new.rename(self.path)

    @property
    def faults(self) -> list[dict[str, Any]]:
        return [fault for each in self.campaigns for fault in each["faults"] if "to_end" in fault]

    @property
    def killed(self) -> int:
        return sum(fault["kills"] for each in self.kills for fault in each["faults"])

    @property
    def problems(self) -> list[str]:
        return [
            f"seed {each['seed']}: {problem}" for each in (*self.campaigns, *self.kills) for problem in each["problems"]
        ]

    def missing(self) -> list[Cell]:
        hit = {(fault["phase"], fault["kind"]) for fault in self.faults}
        return [cell for cell in FEASIBLE if cell not in hit]


def chaos(rounds: int, folder: Path, *, seed: int, kills: int) -> State:
    """Runs campaigns until `rounds` faults have struck and every feasible cell has occurred, and then the kills."""
    folder.mkdir(parents=True, exist_ok=True)
    state = State.load(folder / "outcomes.json", seed)
    print(
        f"seed {state.seed}; {len(state.faults)} faults and {state.killed} kills are recorded in {state.path}", flush=True
    )
    with open_site(folder / "site") as site:
        while len(state.faults) < rounds or state.missing():
            number = len(state.campaigns)
            _clear(site, f"seed-{state.seed + number}")
            count = min(FAULTS, max(rounds - len(state.faults), 10))
            report = campaign(site, state.seed + number, state.missing()[:count], asynchronous=number % 2 == 1, count=count)
            state.campaigns.append(asdict(report))
            _tell(state, report)
        while state.killed < kills:
            number = len(state.kills)
            _clear(site, f"kills-{state.seed + number}")
            report = killed_while_saving(site, state.seed + number, min(10, kills - state.killed))
            state.kills.append(asdict(report))
            _tell(state, report)
    return state


def _tell(state: State, report: Report) -> None:
    state.save()
    verdict = "as it should" if not report.problems else "PROBLEMS:\n  " + "\n  ".join(report.problems)
    print(
        f"{time.strftime('%T')} seed {report.seed}: {len(report.faults)} faults, {report.starts} starts, "
        f"{report.seconds:.0f} s; {len(state.faults)} faults and {state.killed} kills so far, "
        f"{len(state.missing())} cells to come; {verdict}",
        flush=True,
    )


def _clear(site: Site, name: str) -> None:
    """Removes the files of an interrupted campaign."""
    for path in (*site.folder.glob(f"{name}.*"), site.runs / name, site.folder / "runs" / name):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def markdown(state: State) -> str:
    """Returns the table of docs/reliability.md."""
    counts = {cell: 0 for cell in FEASIBLE}
    for fault in state.faults:
        counts[Cell(fault["phase"], fault["kind"])] += 1
    notes = list(dict.fromkeys(EMPTY.values()))

    def entry(cell: Cell) -> str:
        return str(counts[cell]) if cell in counts else f"- ({notes.index(EMPTY[cell]) + 1})"

    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    lines += [f"| {phase} | {' | '.join(entry(Cell(phase, kind)) for kind in KINDS)} |" for phase in PHASES]
    lines += ["", "; ".join(f"({number}) {note}" for number, note in enumerate(notes, start=1)) + "."]
    dead = sorted(fault["to_end"] for fault in state.faults if fault["kind"] in ("exception", "SIGKILL"))
    frozen = sorted(fault["to_end"] for fault in state.faults if fault["kind"] == "SIGSTOP")
    lines += [
        "",
        f"{len(state.faults)} faults in {len(state.campaigns)} runs of {STEPS} steps on {RANKS} ranks, first seed "
        f"{state.seed}, and {state.killed} kills of all ranks while saving; {len(state.problems)} problems. From an "
        f"exception or SIGKILL to the end of all ranks: {_median(dead)} s in the middle, {max(dead, default=0):.1f} s at "
        f"most; from SIGSTOP: {_median(frozen)} s and {max(frozen, default=0):.1f} s.",
    ]
    return "\n".join(lines)


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
    if options.markdown:
        print(markdown(State.load(options.folder / "outcomes.json", seed)))
        return 0
    os.nice(10)
    state = chaos(options.rounds, options.folder, seed=seed, kills=options.kills)
    print(markdown(state))
    return 1 if state.problems else 0


if __name__ == "__main__":
    sys.exit(main())
