"""Draws the figure of docs/results.md: the loss of fewer experts in adamoe-2, and the comparison of methods."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from research.experiments.comparison import differences
from research.experiments.verdict_figure import save
from research.experiments.verdicts import Records, of_arm, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, for colour-blind readers. Each series has a mark of its own, too.
SERIES = {"all": ("all tokens", "#000000", "o"), "text": ("text", "#0072B2", "s"), "image": ("pictures", "#D55E00", "^")}
BUDGETS = (("#0072B2", "o"), ("#D55E00", "s"))
ARMS = {
    "k150": "fixed, by layer",
    "random_drop": "random draw",
    "modality_drop": "random draw, one load\nfor text, one for pictures",
    "id_drop": "random draw, a load\nfor each token id",
    "m8k3": "AdaMoE",
}
METHODS = ("longcat", "adamoe", "dynmoe", "expert_choice", "expert_threshold", "top_p", "remoe")
COMPARED = 42  # number of differences in the tables of the comparison
TWO_SIDED = 0.975  # confidence of each bound of a two-sided 95 % interval
INCHES = (10.0, 4.3)


def draw_summary(adamoe: Records, comparisons: Mapping[str, Records], path: Path) -> None:
    """Writes the figure from the records of adamoe-2 and from the records of the comparisons (by name)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # import takes seconds; needs no window system

    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=INCHES, layout="constrained")
        left, right = figure.subplots(1, 2)
        _loads(left, adamoe)
        _methods(right, comparisons)
    save(figure, path)


def _loads(axes: "Axes", records: Records) -> None:
    labels = []
    for place, (arm, name) in enumerate(ARMS.items()):
        loads = [each["load"]["all"] for each in of_arm(records, arm).values()]
        labels.append(f"{name}\n({sum(loads) / len(loads):.2f} experts)")
        for shift, (part, (label, colour, mark)) in zip((-0.22, 0.0, 0.22), SERIES.items(), strict=True):
            found = paired(differences(records, arm, "top2", f"loss.{part}", 1e3), TWO_SIDED)
            style = {"fmt": mark, "color": colour, "capsize": 2, "markersize": 5, "label": label if place == 0 else None}
            axes.errorbar(found.mean, place + shift, xerr=found.mean - found.lower, **style)
    axes.set_title("adamoe-2: what it costs to take fewer than 2 experts", fontsize=9)
    axes.set_xlabel("loss above top-2's, thousandths of a nat\n(bars: two-sided 95 % intervals, 5 seeds)")
    _finish(axes, labels)


def _methods(axes: "Axes", comparisons: Mapping[str, Records]) -> None:
    for shift, (colour, mark), (name, records) in zip((-0.16, 0.16), BUDGETS, comparisons.items(), strict=True):
        for place, method in enumerate(METHODS):
            values = differences(records, method, "fixed", "loss.all")
            wide, narrow = (paired(values, 1.0 - (1.0 - TWO_SIDED) / number) for number in (COMPARED, 1))
            for found, width in ((wide, 0.7), (narrow, 2.6)):
                axes.plot([found.lower, found.upper], [place + shift] * 2, "-", color=colour, linewidth=width)
            label = name.replace("-", " ") if place == 0 else None
            axes.plot(narrow.mean, place + shift, mark, color=colour, markersize=5, label=label)
    axes.set_xlim(-1.15, 1.15)
    axes.set_title("methods at one budget: no difference is shown", fontsize=9)
    axes.set_xlabel(
        f"loss less that of a fixed number, nats (3 seeds)\nthick: two-sided 95 % intervals; thin: corrected for {COMPARED}"
    )
    _finish(axes, METHODS)


def _finish(axes: "Axes", labels: "list[str] | tuple[str, ...]") -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.axvline(0.0, color="#999999", linewidth=0.8, linestyle="--")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="best")
