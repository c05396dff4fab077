"""Runs that break many times, resume each time, and end with the bits of the undisturbed run.

    python -m tests.support.chaos --rounds 200          # make chaos ROUNDS=200; an interrupted one goes on
    python -m tests.support.chaos --markdown            # the table of docs/reliability.md, from what was recorded

A campaign is one run of 60 steps on 4 ranks with up to 20 faults; its ranks are started by the local launcher, which
restarts them by itself where its rules say so; where they do not, somebody mends the data and starts it again, as a user
would. Between campaigns all ranks are killed at random moments while a checkpoint is written.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from launchers.restart import committed_step
from moe_dist.config.schema import CheckpointSection
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.monitor.tags import reproducible_part
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import child_of
from tests.support.cells import EMPTY, FEASIBLE, KINDS, PHASES, SAVING, Cell
from tests.support.injection import PLAN, PROGRAM, Fault, FaultPlan, build_interposer, environment
from tests.support.tiny import tiny_config, tiny_dataset, write_config

ROOT = Path(__file__).parents[2]
RANKS, STEPS, SAVE_EVERY, FAULTS = 4, 60, 5, 20
DISK_MIB = 32
START_SECONDS = 60.0  # that a rank may take until it waits for its peers, on a busy machine
END_SECONDS = 10.0  # from a rank's death to the end of all
WATCHDOG_SECONDS, MEETING_SECONDS = 30.0, 180.0  # for a collective, and for ranks to meet: on a busy machine as well
MOST_FROZEN = 2  # of a campaign: each costs the watchdog's time
NOT_ENDING = ("ENOSPC", "EIO", "truncated file")  # while a checkpoint is saved: reported, tried again


# --- a campaign's place


@dataclass
class Site:
    """Folder of a campaign: its own copy of the data, a small disk for the run, and the undisturbed run to compare with.

    Attributes:
        folder: On an ordinary file system.
        disk: A small tmpfs where mounting is permitted, else None: then a full disk is an interposed system call.
    """

    folder: Path
    disk: Path | None
    interposer: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def runs(self) -> Path:
        return (self.disk or self.folder) / "runs"

    def mend(self) -> None:
        """Puts the data back."""
        for path in (self.folder / "pristine").iterdir():
            shutil.copy2(path, self.data / path.name)


@contextlib.contextmanager
def open_site(folder: Path) -> Iterator[Site]:
    """Makes the place of a campaign, and takes the small disk away at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pristine").exists():
        tiny_dataset(folder / "pristine")
    shutil.copytree(folder / "pristine", folder / "data", dirs_exist_ok=True)
    disk: Path | None = folder / "disk"
    assert disk is not None
    disk.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", disk], capture_output=True).returncode:
        disk = None
    try:
        yield Site(folder, disk, build_interposer(folder))
    finally:
        if disk is not None:
            subprocess.run(["umount", "--lazy", disk], check=True)


def settings(name: str, *, ranks: int, **changes: Any) -> dict[str, Any]:
    """What the runs have in common."""
    values: dict[str, Any] = {
        "run.name": name,
        "train.steps": STEPS,
        "train.global_batch": 2 * ranks,
        "train.max_skipped_in_a_row": 1,  # a step that is skipped would change all that follow: the run goes back instead
        "checkpoint.every": SAVE_EVERY,
        "evaluation.every": 20,
        "evaluation.balance_efficiency": False,
        "evaluation.ablate_experts": False,
        "parallel.ep": ranks,
        "parallel.timeout_seconds": MEETING_SECONDS,
        "parallel.watchdog_seconds": WATCHDOG_SECONDS,
        "monitor.sinks": [{"kind": "console", "every": 20}, {"kind": "jsonl"}],
    }
    return {**values, **{key.replace("__", "."): value for key, value in changes.items()}}


def started(config: Path, log: Path, *, max_restarts: int, variables: Mapping[str, str] | None = None) -> int:
    """One call of the local launcher in a process of its own, which dies with us; its verdict."""
    command = [sys.executable, "-m", "tests.support.chaos", "--launch", str(config), "--ends", f"{log}.ends"]
    with log.open("ab") as stream:
        return subprocess.run(
            [*command, "--max-restarts", str(max_restarts)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
            stdout=stream,
            stderr=stream,
            preexec_fn=child_of(os.getpid(), ignore_stop=False),
        ).returncode


def launch_and_note(config: Path, ends: Path, max_restarts: int) -> int:
    """The local launcher with the ranks of `injection`; notes when the last rank of each attempt ended."""
    from launchers import local

    run = local._run

    def noted(commands: Any, folder: RunFolder, attempt_id: str, *rest: Any) -> Any:
        outcome, offsets = run(commands, folder, attempt_id, *rest)
        end = {"attempt": attempt_id, "time": time.time(), "codes": outcome.codes}
        steps = [line["step"] for line in read_lines(folder.metrics_jsonl)] if folder.metrics_jsonl.exists() else []
        end |= {"step": max(steps, default=0), "committed": committed_step(folder.checkpoints)}
        with ends.open("a") as stream:
            stream.write(json.dumps(end) + "\n")
        return outcome, offsets

    local._run = noted  # pyright: ignore
    return local.launch(config, program=PROGRAM, max_restarts=max_restarts)


# --- what is compared


def tensors(run: RunFolder) -> dict[tuple[str, str], np.ndarray]:
    """Every piece of the newest checkpoint, parameters and moments, by name and place."""
    folder = run.checkpoints / (run.checkpoints / "latest").read_text().strip()
    found: dict[tuple[str, str], np.ndarray] = {}
    for path in sorted(folder.glob("shard_*.safetensors")):
        with safe_open(path, framework="np") as shard:
            places = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
            found |= {(name, str(places[name])): shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def differences(run: RunFolder, undisturbed: RunFolder) -> list[str]:
    """What is not the same to the last bit; and steps that are missing or there twice."""
    faults = []
    ours, theirs = tensors(run), tensors(undisturbed)
    if ours.keys() != theirs.keys():
        faults.append(f"other tensors: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    faults += [f"{name} differs" for name in ours.keys() & theirs.keys() if ours[name].tobytes() != theirs[name].tobytes()]
    lines, wanted = ([reproducible_part(line) for line in read_lines(each.metrics_jsonl)] for each in (run, undisturbed))
    steps = [line["step"] for line in lines if line["kind"] == "step"]
    if steps != list(range(1, len(steps) + 1)):
        faults.append(f"metrics.jsonl has the steps {steps}")
    if lines != wanted:
        first = next((a["step"] for a, b in zip(lines, wanted, strict=False) if a != b), len(wanted))
        faults.append(f"metrics.jsonl differs from step {first} on")
    return faults


def left_over(plan: Path) -> list[int]:
    """Processes that still run with the plan in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and f"{PLAN}={plan}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


# --- which faults


def draw(rng: random.Random, wanted: Sequence[Cell] = (), *, count: int = FAULTS) -> tuple[Fault, ...]:
    """`count` faults at random ranks and steps, that cover every phase and every kind; `wanted` cells first."""
    cells = list(wanted)[:count]
    order = rng.sample(FEASIBLE, len(FEASIBLE))

    def frozen() -> int:
        return sum(cell.kind == "SIGSTOP" for cell in cells)

    for cell in sorted(order, key=lambda cell: cell.kind == "SIGSTOP"):
        phases, kinds = {each.phase for each in cells}, {each.kind for each in cells}
        if len(cells) < count and (cell.phase not in phases or cell.kind not in kinds):
            cells.append(cell)
    while len(cells) < count:
        cell = rng.choice(FEASIBLE)
        if cell.kind != "SIGSTOP" or frozen() < MOST_FROZEN:
            cells.append(cell)
    rng.shuffle(cells)
    if cells[-1].phase == "import":  # it strikes at the start after its predecessor: there must be one
        other = next(at for at, cell in enumerate(cells) if cell.phase != "import")
        cells[-1], cells[other] = cells[other], cells[-1]
    steps = sorted(rng.sample(range(2, STEPS - 6), len(cells)))
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


# --- a campaign


@dataclass
class Report:
    """What came of a campaign.

    Attributes:
        seed: Of its faults.
        faults: One entry each: cell, rank, step, and what was seen.
        problems: What must not be; empty is a pass.
        starts: How often the launcher was called.
        seconds: Of all.
    """

    seed: int
    asynchronous: bool
    faults: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


def saving(asynchronous: bool) -> dict[str, Any]:
    """The configuration's switch, where there is one."""
    return {"checkpoint.asynchronous": asynchronous} if "asynchronous" in CheckpointSection.model_fields else {}


def undisturbed_run(site: Site) -> RunFolder:
    """The run that all others must equal; made once for a site."""
    config = tiny_config(site.folder / "pristine", site.folder / "runs", settings("undisturbed", ranks=RANKS))
    run = RunFolder.of(config)
    if not run.finished(config):
        code = started(
            write_config(config, site.folder / "undisturbed.yaml"), site.folder / "undisturbed.log", max_restarts=0
        )
        assert code == 0, f"the undisturbed run ended with {code}; see {site.folder / 'undisturbed.log'}"
    return run


def campaign(
    site: Site, seed: int, wanted: Sequence[Cell] = (), *, asynchronous: bool = False, count: int = FAULTS
) -> Report:
    """One run with its faults, to its end."""
    begin = time.monotonic()
    undisturbed = undisturbed_run(site)
    name = f"seed-{seed}"
    log = site.folder / f"{name}.log"
    struck = site.folder / f"{name}.struck"
    struck.mkdir()
    plan_path = site.folder / f"{name}.plan"
    plan = FaultPlan(draw(random.Random(seed), wanted, count=count), struck, site.data / "captions_train", site.disk)
    plan.write(plan_path)
    changes = settings(name, ranks=RANKS) | saving(asynchronous)
    config = tiny_config(site.data, site.runs, changes)
    path = write_config(config, site.folder / f"{name}.yaml")
    report = Report(seed, asynchronous)
    site.mend()
    while report.starts <= 2 * len(plan.faults):
        report.starts += 1
        code = started(path, log, max_restarts=3, variables=environment(plan_path, site.interposer))
        report.problems += [f"process {pid} outlived the launcher" for pid in left_over(plan_path)]
        if code == 0:
            break
        site.mend()
    else:
        report.problems.append(f"the run did not end: see {log}")
    run = RunFolder.of(config)
    _look_back(report, plan, run, Path(f"{log}.ends"))
    if not report.problems:
        report.problems += differences(run, undisturbed)
    report.seconds = time.monotonic() - begin
    if not report.problems:
        shutil.rmtree(run.path)
    return report


def _look_back(report: Report, plan: FaultPlan, run: RunFolder, ends: Path) -> None:
    """What each fault did to its attempt, and whether that is what it should do."""
    attempts = list(run.read_status().attempts)
    ended = {each["attempt"]: each for each in map(json.loads, ends.read_text().splitlines())}
    records = {fault.number: plan.struck(fault.number) for fault in plan.faults}
    for fault in plan.faults:
        seen: dict[str, Any] = {**asdict(fault)}
        report.faults.append(seen)
        record = records[fault.number]
        if record is None:
            report.problems.append(f"fault {fault} never struck")
            continue
        alone = sum(other is not None and other["attempt"] == record["attempt"] for other in records.values()) == 1
        at = next((n for n, each in enumerate(attempts) if each.attempt_id == record["attempt"]), None)
        seen["redone"] = redone(ended[record["attempt"]])
        seen["to_end"] = round(ended[record["attempt"]]["time"] - record["time"], 2)
        if at is not None:
            ending, following = attempts[at], attempts[at + 1 :]
            seen |= {"verdict": ending.verdict, "reason": ending.reason.partition("\n")[0][:200], "named": ending.rank}
            seen["restarted"] = bool(following) and following[0].restarts > 0
        if alone:
            report.problems += [f"{fault}: {each}; {seen}" for each in unexpected(fault, seen)]
    for end in ended.values():
        # A save that was made to fail is missed on purpose; one that is still in flight counts as not there yet.
        missed = sum(
            record is not None
            and record["attempt"] == end["attempt"]
            and fault.phase in SAVING
            and fault.kind in NOT_ENDING
            for fault, record in ((fault, records[fault.number]) for fault in plan.faults)
        )
        if redone(end) > SAVE_EVERY * (1 + missed + report.asynchronous):
            report.problems.append(f"{redone(end)} steps are taken again after attempt {end['attempt']}")


def unexpected(fault: Fault, seen: Mapping[str, Any]) -> Iterator[str]:
    """What a fault should have done and has not, where it was the only one of its attempt."""
    verdict, reason = seen.get("verdict"), str(seen.get("reason", ""))
    survives = fault.phase in SAVING and fault.kind in NOT_ENDING
    if fault.kind in ("exception", "SIGKILL") and seen["to_end"] > END_SECONDS:
        yield f"the others ended {seen['to_end']} s after it"
    # Before they meet, each peer waits from when it has started itself.
    waited = MEETING_SECONDS + START_SECONDS if fault.phase == "import" else 1.2 * WATCHDOG_SECONDS
    if fault.kind == "SIGSTOP" and seen["to_end"] > waited + END_SECONDS:
        yield f"the others ended {seen['to_end']} s after it"
    if verdict is None:
        return  # it never opened the run
    wanted = {"stop signals": 75, "non-finite gradient": 70, "truncated file": 65}.get(fault.kind, 1)
    if not survives and verdict != wanted:
        yield f"the verdict is not {wanted}"
    if fault.kind in ("SIGKILL", "SIGSTOP") and seen["named"] != fault.rank:
        yield "another rank is named"
    if fault.kind == "SIGKILL" and "killed by SIGKILL" not in reason:
        yield "the reason is not the kill"
    if fault.kind == "SIGSTOP" and "frozen" not in reason:
        yield "the reason is not the freeze"
    if fault.kind == "exception" and fault.phase not in SAVING and "a fault that a test injected" not in reason:
        yield "the reason is not the exception"


def redone(end: Mapping[str, Any]) -> int:
    """Steps that the next attempt takes again."""
    return max(0, int(end["step"]) - int(end["committed"]))


# --- killed while saving


def killed_while_saving(site: Site, seed: int, kills: int, *, ranks: int = 2) -> Report:
    """SIGKILL of all ranks at random moments of saves, one launch each; what `latest` names is verified after each."""
    begin, rng = time.monotonic(), random.Random(seed)
    name = f"kills-{seed}"
    log, struck, plan_path = site.folder / f"{name}.log", site.folder / f"{name}.struck", site.folder / f"{name}.plan"
    struck.mkdir()
    faults = tuple(
        Fault(number, rng.randrange(ranks), 2 + 2 * number, "checkpoint write", "SIGKILL all", rng.uniform(0.0, 0.3))
        for number in range(kills)
    )
    FaultPlan(faults, struck, site.data / "captions_train", None).write(plan_path)
    changes = settings(name, ranks=ranks, train__steps=2 * kills + 4) | {"checkpoint.every": 1}
    config = tiny_config(site.data, site.folder / "runs", changes)
    path, run = write_config(config, site.folder / f"{name}.yaml"), RunFolder.of(config)
    report = Report(seed, asynchronous=True)
    torn = 0
    while report.starts <= 2 * kills + 2:
        report.starts += 1
        code = started(path, log, max_restarts=0, variables=environment(plan_path, site.interposer))
        torn += any(run.checkpoints.glob("step_*.tmp"))
        report.problems += [f"start {report.starts}: {each}" for each in unverified(run)]
        if code == 0:
            break
    else:
        report.problems.append(f"the run did not end: see {log}")
    hit = len(list(struck.glob("struck_*")))
    if hit != kills:
        report.problems.append(f"{hit} of {kills} kills struck")
    report.faults = [{"kills": hit, "left a partial folder": torn}]
    report.seconds = time.monotonic() - begin
    shutil.rmtree(run.path)
    return report


def unverified(run: RunFolder) -> list[str]:
    """What is wrong with the checkpoint that `latest` names: by the tool that users have, and by reading every piece."""
    if not committed_step(run.checkpoints):
        return []
    try:
        odd = [name for name, piece in tensors(run).items() if not np.isfinite(piece).all()]
    except Exception as error:  # whatever a torn file makes of it
        return [f"latest cannot be read: {error!r}"]
    if odd:
        return [f"not finite: {odd[:3]}"]
    if importlib.util.find_spec("tools.verify_checkpoint") is None:
        return []
    command = [sys.executable, "-m", "tools.verify_checkpoint", str(run.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [done.stdout[-1000:] + done.stderr[-2000:]]


# --- make chaos


@dataclass
class State:
    """What `make chaos` has done so far, in a file that is replaced after each campaign."""

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
    """Campaigns until `rounds` faults have struck and no feasible cell is left out, then the kills."""
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
    """Removes what an interrupted campaign left."""
    for path in (*site.folder.glob(f"{name}.*"), site.runs / name, site.folder / "runs" / name):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def markdown(state: State) -> str:
    """The table of docs/reliability.md."""
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
    parser.add_argument("--launch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--max-restarts", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.launch is not None:
        return launch_and_note(options.launch, options.ends, options.max_restarts)
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
