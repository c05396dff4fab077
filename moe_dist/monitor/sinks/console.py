"""Defines the console sink. It shows a progress bar or lines, evaluations, hints, and the final table."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from moe_dist.monitor.compute_map import loads_text
from moe_dist.monitor.metrics import Record, depth_metrics
from moe_dist.monitor.routing_hints import Hint
from moe_dist.monitor.sinks.sink import Sink, SinkContext
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult

logger = logging.getLogger(__name__)

SHOWN_GROUPS = 3  # largest number of groups that a line shows
EVALUATING = "evaluating"  # shown after the last step, in place of the remaining time
WIDE = 120  # smallest number of terminal columns for which the bar shows group names


@dataclass(frozen=True)
class Check:
    """One line of the summary table: a measurement, and the rule that it must meet."""

    name: str
    value: str
    rule: str
    passed: bool


class ConsoleSink(Sink):
    """Shows the run on the console. A terminal gets a progress bar. A console that is no terminal, or cannot redraw a line
    (TERM=dumb), gets one line every `every` steps."""

    def __init__(
        self,
        context: SinkContext,
        *,
        every: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._every, self._clock = context.total_steps, every, clock
        self._console = console or Console(highlight=False)
        # start of this attempt; the remaining time is estimated from it
        self._began_at, self._began_step = clock(), context.resume_step
        self._previous: EvaluationResult | None = None
        self._progress: Progress | None = None
        if self._console.is_interactive:  # a terminal that can redraw a line; False for TERM=dumb
            self._progress = Progress(
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(self._total)) + 1)),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
                # The remaining time is not rich's estimate, because that estimate leaves out the time between steps.
                TextColumn("{task.fields[left]}", style="cyan", table_column=Column(no_wrap=True, min_width=len("3h04m"))),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task("", total=self._total, completed=context.resume_step, numbers="", left="")
            self._progress.start()

    def step(self, record: Record) -> None:
        left = f"{self._time_left(record.step)} left" if record.step < self._total else EVALUATING
        if self._progress is not None:
            numbers = bar_numbers(record.scalars, named=self._console.width >= WIDE)
            short = left.removesuffix(" left")
            self._progress.update(self._task, completed=record.step, numbers=escape(numbers), left=short)
        elif record.step % self._every == 0 or record.step == self._total or record.step == self._began_step + 1:
            self._print(f"step {record.step}/{self._total}  {line_numbers(record.scalars)}  {left}")

    def hint(self, hint: Hint, step: int) -> None:
        self._print(f"hint (step {step}): {hint.text}", style="yellow")
        logger.info("hint: %s", hint.text)  # rank 0's log file does not contain standard output

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._print(evaluation_line(result, self._previous), style="bold")
        for line in choice_lines(result):
            self._print(line)
        if result.compute_map is not None:
            self._print(f"compute map: {loads_text(result.compute_map)}")
        if result.mixture_of_depths is not None and result.mixture_of_depths.tokens_LG.any():
            self._print(depth_text(result.mixture_of_depths))
        self._previous = result

    def flush(self) -> None:
        self._console.file.flush()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: str, style: str | None = None) -> None:
        unbroken = not self._console.is_terminal  # in a log each message is one line, however long
        self._console.print(Text(text), style=style, soft_wrap=unbroken)

    def _time_left(self, step: int) -> str:
        """Returns the remaining time, from this attempt's mean time per step with evaluations and checkpoints."""
        done = max(1, step - self._began_step)
        return duration((self._clock() - self._began_at) / done * (self._total - step))


def bar_numbers(scalars: Mapping[str, float | None], *, named: bool) -> str:
    """Returns the numbers beside the progress bar. `named` adds group names, for which 80 columns are too few."""
    loss, rate = scalars.get("loss/total"), scalars.get("perf/tokens_per_second")
    return (
        f"loss {_number(loss, '.3f')} · {_thousands(rate)} tok/s · "
        f"experts {_by_group(scalars, 'experts_per_token', named)} · "
        f"{'imbalance' if named else 'imb'} {_by_group(scalars, 'load_imbalance', named)}"
    )


def line_numbers(scalars: Mapping[str, float | None]) -> str:
    """Returns the numbers of a log line, including the loss of each modality."""
    parts = [f"{tag[5:]} {_number(v, '.3f')}" for tag, v in scalars.items() if _is_modality_loss(tag)]
    loss = f"loss {_number(scalars.get('loss/total'), '.3f')}" + (f" ({', '.join(parts)})" if parts else "")
    rate = f"{_thousands(scalars.get('perf/tokens_per_second'))} tokens/s"
    experts = f"experts/token {_by_group(scalars, 'experts_per_token', True)}"
    imbalance = f"imbalance {_by_group(scalars, 'load_imbalance', True)}"
    return "  ".join([loss, rate, experts, imbalance, *_dropped(scalars)])


def _dropped(scalars: Mapping[str, float | None]) -> list[str]:
    """Returns a text with the share of (token, expert) pairs that a capacity dropped in this step; empty without drops."""
    share = scalars.get("moe/dropped_share") or 0.0
    return [f"dropped {share:.1%} of the pairs"] if share else []


def evaluation_line(result: EvaluationResult, previous: EvaluationResult | None) -> str:
    """Returns a line with the held-out losses. The change of a loss is added if the previous evaluation had equally many
    tokens. The final evaluation has more tokens."""
    parts = []
    for name, loss in result.loss.items():
        change = ""
        if previous is not None and name in previous.loss and previous.tokens.get(name) == result.tokens.get(name):
            change = f" ({loss - previous.loss[name]:+.3f})"
        parts.append(f"{name.replace('_', ' ')} {loss:.3f}{change}")
    line = f"evaluation after step {result.step}: held-out " + ", ".join(parts)
    efficiencies = {"by time": result.balance_efficiency, "by count": result.balance_efficiency_by_count}
    known = ", ".join(
        f"{value:.2f} {by}{' (above 1 by noise)' if value > 1.0 else ''}"
        for by, value in efficiencies.items()
        if value is not None
    )
    if known:
        line += f"; balance efficiency {known}"
    return line


def choice_lines(result: EvaluationResult) -> list[str]:
    """Returns lines for expert choice: held-out losses and experts per token with causal and with training's selection."""
    losses = [
        f"held-out {name.replace('_', ' ')} {result.loss[name]:.3f}, "
        f"with the selection of training, which sees later tokens, {seen:.3f} ({seen - result.loss[name]:+.3f})"
        for name, seen in result.choice_loss.items()
    ]
    loads = [
        f"experts per token of {name} {result.experts_per_token[name]:.3f}, with the selection of training {seen:.3f}"
        for name, seen in result.choice_experts_per_token.items()
    ]
    return losses + loads


def depth_text(depths: DepthStatistics) -> str:
    """Returns a text: the fraction of held-out tokens that mixture-of-depths layers computed, and the target fraction."""
    computed_L = depth_metrics(depths)["computed"]
    taken_G, tokens_G = depths.taken_LG.sum(0), depths.tokens_LG.sum(0)
    shares = [f"{name} {taken_G[g] / tokens_G[g]:.3f}" for g, name in enumerate(depths.groups) if tokens_G[g]]
    return (
        f"mixture-of-depths layers computed {computed_L.mean():.3f} of the held-out tokens, target {depths.token_share:g} "
        f"(layers {computed_L.min():.3f} to {computed_L.max():.3f}; {', '.join(shares[:SHOWN_GROUPS])})"
    )


def summary_table(checks: Sequence[Check], *, title: str = "Summary") -> Table:
    """Returns a table with one line, pass or fail, for each check of a finished run."""
    passed = sum(check.passed for check in checks)
    table = Table(title=title, caption=f"{passed} of {len(checks)} passed", title_justify="left", caption_justify="left")
    table.add_column("check")
    table.add_column("measured", justify="right")
    table.add_column("required")
    table.add_column("")
    for check in checks:
        mark = Text("pass", style="green") if check.passed else Text("FAIL", style="bold red")
        table.add_row(escape(check.name), escape(check.value), escape(check.rule), mark)
    return table


def duration(seconds: float) -> str:
    """Formats a duration as 4:05 (minutes and seconds), 3h04m or 2d03h, short enough for a narrow terminal."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}:{rest:02}"


def _by_group(scalars: Mapping[str, float | None], family: str, named: bool) -> str:
    prefix = f"moe/{family}/"
    values = [(tag[len(prefix) :], value) for tag, value in scalars.items() if tag.startswith(prefix)]
    shown = [f"{name} {_number(v, '.2f')}" if named else _number(v, ".2f") for name, v in values[:SHOWN_GROUPS]]
    return (", " if named else "/").join(shown)


def _is_modality_loss(tag: str) -> bool:
    return tag.startswith("loss/") and tag not in ("loss/total", "loss/balance", "loss/z", "loss/auxiliary")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _thousands(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 1000.0:
        return f"{value:.3g}" if value < 99.5 else f"{value:.0f}"
    return f"{value / 1000:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
