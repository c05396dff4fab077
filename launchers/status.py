"""Shows the state of runs: python -m launchers.status [RUN ...] [--root runs]. Only reads run folders."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launchers.run_progress import RunProgress, RunState, is_run, read_progress
from launchers.table import launcher_table
from moe_dist.errors import EXIT_DONE, ConfigError, printable
from moe_dist.runtime.cause import line_of_cause, way_on
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.hints import warning_lines, warnings_text
from moe_dist.runtime.status import AttemptRecord

WIDTH = 120  # width of the output if standard output is no terminal
BAR = 60  # width of the progress bar
ATTEMPTS_SHOWN, LOSSES_SHOWN = 8, 40
_STYLES = {
    RunState.RUNNING: "green",
    RunState.DONE: "bold green",
    RunState.STOPPED: "yellow",
    RunState.SILENT: "yellow",
    RunState.NEW: "dim",
}
_SILENT = "its writer is suspended or died with its node; a new attempt takes the lease over after 30 s"
_VERDICTS = {0: "done", 75: "stopped, saved", 78: "configuration", 69: "placement", 65: "data", 70: "diverged"}


def main(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Name or folder; default all.")] = None,
    root: Annotated[Path, typer.Option(help="Folder that holds the runs, as run.root.")] = Path("runs"),
) -> None:
    """Show state, step, tokens/s, last checkpoint and restarts: one named run in full, several runs as a table."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    with reports_errors(), ThreadPoolExecutor(32) as pool:  # threads, because a silent run is watched for seconds
        found = list(pool.map(read_progress, find_runs(runs or [], root)))
    console.print(one_run(found[0]) if len(found) == 1 and runs else many_runs(found, width=console.width))
    raise typer.Exit(EXIT_DONE)


def find_runs(names: Sequence[str], root: Path) -> list[Path]:
    """Returns the folders of the named runs, or of all runs below `root`, most recently written first. The folder of a run
    is <root>/<name>; the folder of an array task is <root>/<name>/<task>. Raises ConfigError if there are no runs, or no
    run of a given name."""
    if not names:
        folders = [path for path in root.glob("*") if path.is_dir()] if root.is_dir() else []
        found = [run for path in folders for run in ([path] if is_run(path) else path.glob("*")) if is_run(run)]
        if not found:
            raise ConfigError(f"{root} holds no run; name a run's folder, or the folder of the runs with --root")
        return sorted(found, key=_last_written, reverse=True)  # latest first
    found = []
    for name in names:
        path = next((path for path in (root / name, Path(name)) if path.is_dir()), None)
        if path is None:
            existing = ", ".join(sorted(run.name for run in root.glob("*") if is_run(run)))
            raise ConfigError(
                f"{name}: no such run: the folder {root}/ has none of that name{existing and f' (it has {existing})'}, and "
                f"there is no folder {name}; give the run's folder, or --root FOLDER"
            )
        found += [path] if is_run(path) or not any(map(is_run, path.glob("*"))) else sorted(filter(is_run, path.glob("*")))
    return found


def many_runs(runs: Sequence[RunProgress], *, width: int = WIDTH) -> RenderableType:
    """Returns a table of `width` characters with one line per run. The last column, the reason, gets the rest."""
    table = Table(box=None, pad_edge=False, header_style="bold", width=width)
    for column, name in enumerate(("run", "state", "step", "tokens/s", "left", "checkpoint", "starts")):
        table.add_column(name, no_wrap=True, justify="left" if column < 2 else "right")
    table.add_column("last reason", ratio=1, overflow="ellipsis", no_wrap=True)
    for run in runs:
        name, *rest = map(_plain, _row(run))
        table.add_row(name, _state(run), *rest, _plain(run.why.partition("\n")[0]))
    return table


def _row(run: RunProgress) -> list[str]:
    rate = _rate(run) if run.state is RunState.RUNNING else ""
    starts = str(len(run.attempts)) if run.attempts else "-"
    left = duration(run.remaining_seconds)
    name = f"{run.folder.parent.name}/{run.name}" if run.name.isdecimal() else run.name  # an array task is <name>/<task>
    return [name, _steps(run), rate, left, _checkpoint(run), starts]


def one_run(run: RunProgress) -> RenderableType:
    """Shows all details of one run."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(run):
        facts.add_row(name, _plain(value))
    title = Text("  ").join([_plain(run.name, "bold"), _state(run), _plain(str(run.folder), "dim")])
    parts: list[RenderableType] = [title]
    if run.total_steps:
        parts += [_bar(run.step / run.total_steps, _STYLES.get(run.state, "red")), Text()]
    parts.append(facts)
    if run.attempts:
        parts += [Text(), _attempts(run)]
    return Group(*parts)


def duration(seconds: float | None) -> str:
    """Formats seconds in one or two units, such as '3 h 05 min'; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _bar(share: float, style: str) -> Text:
    filled = round(min(1.0, share) * BAR)
    return Text.assemble(("━" * filled, style), ("╌" * (BAR - filled), "dim"), f" {min(1.0, share):.0%}")


def _plain(text: str, style: str = "") -> Text:
    """Shows a string of a run folder, which any user may have written: ignores markup, and escapes control characters."""
    return Text(printable(text.replace("\n", "\\n").replace("\t", "\\t")), style)


def _facts(run: RunProgress) -> list[tuple[str, str]]:
    age = f", {duration(run.record_age)} ago" if run.record_age is not None else ""
    facts = [("step", _steps(run) + age)]
    if run.tokens_per_second is not None:
        left = f", {duration(run.remaining_seconds)} left" if run.remaining_seconds else ""
        if run.remaining_seconds == 0.0:
            left = "; after its last step: evaluates, then saves"
        facts.append(("pace", f"{_rate(run)} tokens/s, {run.step_seconds or 0.0:.3g} s a step{left}"))
    if run.losses:
        facts.append(("loss", ", ".join(f"{name} {value:.3f}" for name, value in islice(run.losses.items(), LOSSES_SHOWN))))
    saves = f"; the last saves took {run.save_seconds:.1f} s at most" if run.save_seconds is not None else ""
    facts += [("warning", line) for line in warning_lines(run.hints)]
    facts.append(("checkpoint", (f"step {_checkpoint(run)}" if run.checkpoint_step else "none yet") + saves))
    if run.holder is not None:
        beat = f", last heartbeat {duration(run.beat_age)} ago" if run.beat_age is not None else ""
        facts.append(("writer", f"process {run.holder.pid} on {run.holder.host}{beat}"))
    if run.state is RunState.UNREADABLE:
        facts.append(("problem", run.why))
    going_on = way_on(run.checkpoint_step)
    if run.state in (RunState.STOPPED, RunState.DIED, RunState.SILENT):
        facts.append(("next", f"{_SILENT}; {going_on}" if run.state is RunState.SILENT else going_on))
    if run.state in (RunState.FAILED, RunState.REFUSED, RunState.DIVERGED):
        label, _, cause = line_of_cause(run.attempts[-1], run.hints, run.checkpoint_step).partition(": ")
        facts.append((label, cause))
    return facts


def _attempts(run: RunProgress) -> Table:
    """Returns a table of the last attempts in order: their launchers, beginnings, durations, exit codes and reasons."""
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left")
    launchers = launcher_table()
    for column in ("start", "by", "on", "began", "lasted", "to step"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("start", "lasted", "to step") else "left")
    table.add_column("ended", no_wrap=True)
    table.add_column("reason", overflow="fold")
    shown = run.attempts[-ATTEMPTS_SHOWN:]
    hidden = len(run.attempts) - len(shown)
    if hidden:
        table.add_row("", "", "", f"{hidden} earlier", "", "", "", "in status.json", style="dim")
    for number, ending in enumerate(shown, start=hidden + 1):
        current = ending is run.attempts[-1]
        launcher = ending.attempt_id.partition("-")[0]  # each id begins with its launcher
        table.add_row(
            str(number),
            launcher if launcher in launchers else "-",
            _plain(ending.host),
            time.strftime("%F %T", time.localtime(ending.started)),
            duration(max(0.0, ending.ended - ending.started)) if ending.ended is not None else "",
            str(run.step if current and ending.verdict is None else ending.last_step),
            _verdict(ending, run.state if current else None),
            _plain(_reason(ending)),
        )
    return table


def _verdict(ending: AttemptRecord, current: RunState | None) -> Text:
    if ending.verdict is None:
        word = current.value if current in (RunState.RUNNING, RunState.SILENT) else "died"
        return Text(word, style=_STYLES.get(current, "red") if current is not None else "red")
    word = _VERDICTS.get(ending.verdict, "failed")
    style = "green" if ending.verdict == 0 else "yellow" if ending.verdict == 75 else "red"
    return Text(f"{word} ({ending.verdict})", style=style)


def _reason(ending: AttemptRecord) -> str:
    if ending.verdict is None:
        return ""
    on = f" on {ending.rank_host}" if ending.rank_host else ""
    by = f"rank {ending.rank}{on}: " if ending.rank is not None and not ending.reason.startswith("rank ") else ""
    return (by if ending.verdict not in (0, 75) else "") + ending.reason.partition("\n")[0]


def _state(run: RunProgress) -> Text:
    style = "yellow" if run.hints and run.state is RunState.DONE else _STYLES.get(run.state, "bold red")
    return Text(run.state.value + warnings_text(run.hints), style=style)


def _steps(run: RunProgress) -> str:
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def _rate(run: RunProgress) -> str:
    rate = run.tokens_per_second
    if rate is None:
        return ""
    return f"{rate / 1e6:.2f}M" if rate >= 1e6 else f"{rate / 1e3:.1f}k" if rate >= 1e3 else f"{rate:.0f}"


def _checkpoint(run: RunProgress) -> str:
    return f"{run.checkpoint_step}, {duration(run.checkpoint_age)} ago" if run.checkpoint_step else "-"


def _last_written(run: Path) -> float:
    files = (run / "metrics.jsonl", run / "status.json", run / "config.yaml")
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


if __name__ == "__main__":
    run_command(main)
