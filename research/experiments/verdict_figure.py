"""Draws the verdicts of an experiment. For each rule, it shows the paired difference of each seed, the mean
difference with its one-sided bounds, and the margin for the upper bound. Rules with the same unit share a panel."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.experiments.rules import ArmValue, EtaValue, InterpolatedValue, RatioValue, SumValue, ValueRule
from research.experiments.study import Study
from research.experiments.verdicts import Records, Verdict, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, for colour-blind readers.
COLOURS = {"pass": "#0072B2", "fail": "#D55E00", "not testable here": "#000000"}
MARKERS = {"pass": "o", "fail": "X", "not testable here": "d"}  # distinguish the verdicts in a print without colours, too
FAINT = "#999999"
WIDTH, ROW_INCHES, LABEL_CHARACTERS = 8.0, 0.42, 46
UNITS = {  # the keys are metrics, or the first parts of metrics
    "loss": "nats",
    "accuracy": "share of tokens",
    "answers": "share of answers",
    "questions": "share of questions",
    "load": "experts per token",
    "flops": "FLOPs",
    "answers.nats": "nats of an answer",
    "domains.least": "share of tokens",
    "domains.bits": "bits",
}


def save(figure: "Figure", path: Path) -> Path:
    """Writes a figure as SVG and returns its path. Equal figures give equal files."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):  # writes text as text, which halves the file
        figure.savefig(path, metadata={"Date": None})
    return path


def draw_verdicts(study: Study, records: Records, verdicts: Sequence[Verdict], path: Path) -> list[Path]:
    """Writes the figure of all rules that have differences; writes nothing if no rule has differences."""
    from matplotlib.figure import Figure  # import takes seconds; needs no window system

    panels: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.paired is not None:
            panels.setdefault(unit_of(verdict.rule), []).append(verdict)
    if not panels:
        return []
    sizes = [len(each) for each in panels.values()]
    height = ROW_INCHES * sum(sizes) + 0.75 * len(panels) + 0.3
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[size + 0.6 for size in sizes])[:, 0]
    for axes, (unit, mine) in zip(every, panels.items(), strict=True):
        _panel(axes, study, records, mine)
        axes.set_xlabel(f"difference, {unit}" if unit else "difference")
    confidence = f"{100 * study.confidence:.3g} %"
    figure.suptitle(
        f"{study.name}: negative differences support the claims; bars: one-sided {confidence} bounds", fontsize=9
    )
    return [save(figure, path)]


def unit_of(rule: ValueRule) -> str:
    """Returns the unit of a rule's difference."""
    for value in (rule.lower, rule.higher):
        match value:
            case EtaValue():
                return f"ln of a ratio of {UNITS.get(value.cost, value.cost)}"
            case RatioValue():
                return UNITS["loss"]
            case ArmValue():
                metric = value.metric
            case InterpolatedValue():
                metric = value.y
            case SumValue():
                metric = value.sum[0].metric
            case _:
                continue
        first = metric.partition(".")[0]
        return UNITS.get(metric, UNITS.get(first, first))
    return ""


def _panel(axes: "Axes", study: Study, records: Records, verdicts: Sequence[Verdict]) -> None:
    for place, verdict in enumerate(verdicts):
        found = verdict.paired
        assert found is not None
        seeds = differences(study, verdict.rule, records)
        axes.plot(seeds, [place] * len(seeds), ".", color=FAINT, zorder=1)
        reach = [[found.mean - found.lower], [found.upper - found.mean]]
        style = {"fmt": MARKERS[verdict.outcome], "color": COLOURS[verdict.outcome], "capsize": 3, "markersize": 5}
        axes.errorbar(found.mean, place, xerr=reach, **style)
        axes.plot([verdict.rule.margin] * 2, [place - 0.35, place + 0.35], "-", color="black", linewidth=1.2)
        axes.annotate(verdict.outcome, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    labels = ["\n".join(textwrap.wrap(verdict.rule.claim, LABEL_CHARACTERS)) for verdict in verdicts]
    axes.set_yticks(range(len(verdicts)), labels, fontsize=8)
    axes.set_ylim(len(verdicts) - 0.5, -0.5)  # the first rule on top
    axes.axvline(0.0, color=FAINT, linewidth=0.8, linestyle="--")
    axes.grid(axis="x", alpha=0.3)
