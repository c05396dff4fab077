"""Makes runs with planned faults, and reports on these runs.

A campaign is one run with 3 steps for each fault on 4 ranks, with up to 20 faults. The local launcher starts the ranks, and
restarts them where its rules allow. Otherwise the campaign repairs the data and starts the run again, as a user would.
"""

import random
import shutil
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_dist.runtime.run_folder import RunFolder
from tests.support.fault_plan import FEASIBLE, Cell, Fault, FaultPlan, environment
from tests.support.judgement import differences, left_over, look_back, survives, unverified
from tests.support.site import RANKS, Site, read_ends, settings, started
from tests.support.tiny import tiny_config, write_config

ALL_FAULTS = 20  # enough for every phase and every kind
STEPS_PER_FAULT = 3
MOST_FROZEN = 2  # per campaign, because each waits for the watchdog


def draw(rng: random.Random, count: int) -> tuple[Fault, ...]:
    """Draws `count` of ALL_FAULTS faults at random ranks and steps; all of them cover every phase and every kind."""
    cells: list[Cell] = []
    order = rng.sample(FEASIBLE, len(FEASIBLE))

    def frozen() -> int:
        return sum(cell.kind == "SIGSTOP" for cell in cells)

    for cell in sorted(order, key=lambda cell: cell.kind == "SIGSTOP"):
        phases, kinds = {each.phase for each in cells}, {each.kind for each in cells}
        if len(cells) < ALL_FAULTS and (cell.phase not in phases or cell.kind not in kinds):
            cells.append(cell)
    while len(cells) < ALL_FAULTS:
        cell = rng.choice(FEASIBLE)
        if cell.kind != "SIGSTOP" or frozen() < MOST_FROZEN:
            cells.append(cell)
    cells = rng.sample(cells, count)
    # A fault of phase import strikes at the start that follows the previous fault. The previous fault must therefore end
    # its attempt.
    while any(late.phase == "import" and survives(early) for early, late in pairwise(cells)):
        rng.shuffle(cells)
    steps = sorted(rng.sample(range(2, STEPS_PER_FAULT * count - 6), count))
    return tuple(
        Fault(
            number=number,
            rank=0 if cell.phase == "commit" or cell == Cell("import", "ENOSPC") else rng.randrange(RANKS),
            step=step,
            phase=cell.phase,
            kind=cell.kind,
        )
        for number, (cell, step) in enumerate(zip(cells, steps, strict=True))
    )


@dataclass
class Report:
    """The result of a campaign.

    Attributes:
        seed: Seed of the faults.
        asynchronous: Whether saves were asynchronous.
        faults: One entry per fault, with its cell, rank, step and observations.
        problems: Violated requirements; empty if the campaign passed.
        starts: Number of launcher calls.
        seconds: Duration of the campaign.
    """

    seed: int
    asynchronous: bool
    faults: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


def undisturbed_run(site: Site, steps: int) -> RunFolder:
    """Returns a run without faults. All other runs of `steps` steps must equal it. It is made once per site."""
    name = f"undisturbed-{steps}"
    changes = settings(name, ranks=RANKS, train__steps=steps)
    config = tiny_config(site.folder / "pristine", site.folder / "runs", changes)
    run, log = RunFolder.of(config), site.folder / f"{name}.log"
    if not run.finished(config):
        code = started(write_config(config, site.folder / f"{name}.yaml"), log, max_restarts=0)
        assert code == 0, f"the undisturbed run ended with {code}; see {log}"
    return run


def campaign(site: Site, seed: int, faults: int, *, asynchronous: bool) -> Report:
    """Runs one run with `faults` faults to its end."""
    begin, name, steps = time.monotonic(), f"seed-{seed}-{faults}", STEPS_PER_FAULT * faults
    undisturbed = undisturbed_run(site, steps)
    plan = _planned(site, name, draw(random.Random(seed), faults), site.disk)
    changes = settings(name, ranks=RANKS, train__steps=steps, checkpoint__asynchronous=asynchronous)
    config = tiny_config(site.data, site.runs, changes)
    path, run, log = write_config(config, site.folder / f"{name}.yaml"), RunFolder.of(config), site.folder / f"{name}.log"
    report = Report(seed, asynchronous)
    site.mend()
    while report.starts <= 2 * len(plan.faults):
        report.starts += 1
        code = started(path, log, max_restarts=3, variables=environment(_plan_path(site, name), site.interposer))
        report.problems += [f"process {pid} outlived the launcher" for pid in left_over(_plan_path(site, name))]
        if code == 0:
            break
        site.mend()
    else:
        report.problems.append(f"the run did not end: see {log}")
    report.faults, problems = look_back(plan, run, read_ends(log))
    report.problems += problems or ([] if report.problems else differences(run, undisturbed))
    report.seconds = time.monotonic() - begin
    if not report.problems:
        shutil.rmtree(run.path)
    return report


def killed_while_saving(site: Site, seed: int, kills: int, *, ranks: int = 2) -> Report:
    """Kills all ranks with SIGKILL at random moments of saves, one launch each. Verifies the checkpoint of `latest` after
    each."""
    begin, rng, name = time.monotonic(), random.Random(seed), f"kills-{seed}-{kills}"

    def kill(number: int) -> Fault:
        # a write takes at least 20 ms, and a save takes at most 300 ms
        delay = rng.uniform(0.0, 0.3 if number % 2 else 0.02)
        return Fault(number, rng.randrange(ranks), 2 + 2 * number, "checkpoint write", "SIGKILL all", delay)

    plan = _planned(site, name, tuple(kill(number) for number in range(kills)), None)
    changes = settings(name, ranks=ranks, train__steps=2 * kills + 4, checkpoint__every=1)
    config = tiny_config(site.data, site.folder / "runs", changes)
    path, run, log = write_config(config, site.folder / f"{name}.yaml"), RunFolder.of(config), site.folder / f"{name}.log"
    report, torn = Report(seed, asynchronous=True), 0
    while report.starts <= 2 * kills + 2:
        report.starts += 1
        code = started(path, log, max_restarts=0, variables=environment(_plan_path(site, name), site.interposer))
        torn += any(run.checkpoints.glob("step_*.tmp"))  # left by this start: each start first removes older ones
        report.problems += [f"start {report.starts}: {each}" for each in unverified(run)]
        if code == 0:
            break
    else:
        report.problems.append(f"the run did not end: see {log}")
    hit = sum(plan.struck(fault.number) is not None for fault in plan.faults)
    if hit != kills:
        report.problems.append(f"{hit} of {kills} kills struck")
    if not torn:
        report.problems.append(f"none of {kills} kills hit a write")
    report.faults = [{"kills": hit, "left a partial folder": torn}]
    report.seconds = time.monotonic() - begin
    if not report.problems:
        shutil.rmtree(run.path)
    return report


def _planned(site: Site, name: str, faults: tuple[Fault, ...], disk: Path | None) -> FaultPlan:
    """Writes the plan of a run for its ranks."""
    struck = site.folder / f"{name}.struck"
    struck.mkdir()
    plan = FaultPlan(faults, struck, site.data / "captions_train", disk)
    plan.write(_plan_path(site, name))
    return plan


def _plan_path(site: Site, name: str) -> Path:
    return site.folder / f"{name}.plan"
