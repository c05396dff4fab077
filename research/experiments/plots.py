"""Plots the results of an experiment with matplotlib: loss over true (not null) experts per token, true experts per token
over the token's loss, loss over FLOPs, seconds and bytes, and the accuracy of each arm."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import fill as wrapped
from typing import TYPE_CHECKING, Any

import numpy as np

from research.experiments.study import Study
from research.experiments.verdict_figure import save
from research.experiments.verdicts import Records, at_equal_cost, of_arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (9.5, 4.2)
BOTH_INCHES = (13.5, 4.6)
LABEL_CHARACTERS = 44
# The seven colours of Okabe and Ito, for colour-blind readers. Markers distinguish the arms if there are more than seven
# arms, or if a print has no colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("o-", "s-", "^-", "D-", "v-", "P-", "X-", "<--", ">--", "*--", "h--")
ROW_INCHES = 0.28  # height of an arm's row of accuracies
COSTS = {
    "flops": "training FLOPs",
    "seconds": "seconds of training steps",
    "bytes": "bytes that all ranks send to other ranks",
}
LEAST_LOADS = 3  # a picture of loss over load is drawn only if at least this many loads differ by a tenth
IN_FRAME = 0.25  # height of the plot in nats above the best arm; arms with higher losses are only in the legend


def draw(study: Study, records: Records, folder: Path) -> list[Path]:
    """Writes each picture for which `records` has data, and returns the paths of the pictures."""
    panels: dict[str, list[Callable[[Axes], None]]] = {}
    heights: dict[str, float] = {}  # heights in inches of pictures that grow with the number of arms
    loads = {round(record["load"]["all"], 1) for (arm, _), record in records.items() if arm in study.arms}
    if len(loads) >= LEAST_LOADS:
        panels["loss_over_load"] = [lambda axes: _loss_over_load(axes, study, records)]
    if any(map(_adaptive, records.values())):
        panels["load_over_loss"] = [lambda axes: _load_over_loss(axes, study, records)]
    for cost, label in COSTS.items():
        if any(_points(records, arm, cost) for arm in study.arms):
            panels[f"loss_over_{cost}"] = _curves(study, records, cost, label)
    for key, what in (("answers", "documents"), ("questions", "questions")):
        arms = {arm for (arm, _), record in records.items() if key in record}
        if len(arms) > 1:  # a comparison needs a second arm
            heights[key] = max(INCHES[1], ROW_INCHES * len(arms))
            label = f"held-out {what} answered right"
            panels[key] = [lambda axes, k=key, x=label: _accuracies(axes, study, records, k, x)]
    return [_figure(folder / f"{study.name}_{name}.svg", *fill, height=heights.get(name)) for name, fill in panels.items()]


def _figure(path: Path, *fill: Callable[["Axes"], None], height: float | None) -> Path:
    """Draws one panel, or two panels side by side. Each function in `fill` draws a panel. Returns the path."""
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.figure import Figure  # import takes seconds; needs no window system

    with mpl.rc_context({"axes.prop_cycle": cycler(color=COLOURS)}):
        width, usual = INCHES if len(fill) == 1 else BOTH_INCHES
        figure = Figure(figsize=(width, height or usual), layout="constrained")
        for panel, axes in zip(fill, figure.subplots(1, len(fill), squeeze=False)[0], strict=True):
            panel(axes)
    return save(figure, path)


def _loss_over_load(axes: "Axes", study: Study, records: Records) -> None:
    """Draws a dot for each run. A grey line connects the runs with the same seed, because arms are compared by seed."""
    judged = {arm for rule in study.rules for arm in rule.arms}
    starts = {arm.after for arm in study.arms.values()} - judged  # arms that only provide initial weights
    shown = [name for name in study.arms if name not in starts]
    means = {
        name: _mean(each["loss"]["all"] for each in mine) for name in shown if (mine := of_arm(records, name).values())
    }
    top = min(means.values(), default=0.0) + IN_FRAME
    kept = [name for name, mean in means.items() if mean <= top]
    for seed in study.seeds.decisive:
        mine = [(each["load"]["all"], each["loss"]["all"]) for name in kept if (each := records.get((name, seed)))]
        if mine:
            axes.plot(*zip(*sorted(mine), strict=True), "-", color="0.85", linewidth=0.8, zorder=0)
    for place, name in enumerate(kept):
        mine = of_arm(records, name).values()
        load, loss = ([each[part]["all"] for each in mine] for part in ("load", "loss"))
        points = axes.plot(load, loss, _style(place)[0], markersize=4, label=_name(study, name))
        probed = [point for each in mine for point in each["probes"].get("threshold", [])]
        ats = sorted({point["at"] for point in probed})
        if ats:
            chosen = [[point for point in probed if point["at"] == at] for at in ats]
            x = [_mean(point["load"] for point in here) for here in chosen] + [_mean(load)]
            y = [_mean(point["loss"]["all"] for point in here) for here in chosen] + [_mean(loss)]
            axes.plot(
                x,
                y,
                "--",
                color=points[0].get_color(),
                label=wrapped(f"{study.names.get(name, name)}, second experts dropped afterwards", LABEL_CHARACTERS),
            )
    for name in [name for name in means if name not in kept]:
        axes.plot([], [], " ", label=f"({_name(study, name)}: at {means[name]:.2f}, above the frame)")
    _label(axes, "true experts a token", "held-out nats a token")


def _label(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)  # beside the data


def _name(study: Study, arm: str) -> str:
    return wrapped(study.names.get(arm, f"{study.arms[arm].about} ({arm})"), LABEL_CHARACTERS)


def _adaptive(record: Mapping[str, Any]) -> bool:
    """Returns whether different tokens of this run take different numbers of experts."""
    return bool(record["load"]["all"] % 1 and record.get("load_by_loss"))


def _load_over_loss(axes: "Axes", study: Study, records: Records) -> None:
    for name in study.arms:
        tables = [each["load_by_loss"] for each in of_arm(records, name).values() if _adaptive(each)]
        if not tables:
            continue
        places = min(len(table) for table in tables)
        y = [_mean(_total(table[place]) for table in tables) for place in range(places)]
        axes.plot(np.arange(1, places + 1), y, _style(list(study.arms).index(name)), markersize=4, label=_name(study, name))
    _label(axes, "tenth of the held-out tokens, by their loss", "true experts a token")


def _curves(study: Study, records: Records, cost: str, label: str) -> list[Callable[["Axes"], None]]:
    """Returns functions that each draw one panel. The first draws loss over cost. If there is a reference arm, the second
    draws each arm's loss minus the loss of the reference arm at equal cost."""
    reference = study.reference or ""
    of = _points(records, reference, cost)
    found = {name: curves for name in study.with_whole_cost() if (curves := _points(records, name, cost))}

    def losses(axes: "Axes") -> None:
        for place, (name, curves) in enumerate(found.items()):
            axes.plot(*_averaged(curves.values()), _style(place), markersize=3, label=_name(study, name))
        _logarithmic(axes)
        _label(axes, label, "held-out nats a token")

    def differences(axes: "Axes") -> None:
        for place, curves in enumerate(found.values()):
            over = [at_equal_cost(curve, of[seed]) for seed, curve in curves.items() if seed in of]
            if over:
                axes.plot(*_averaged(over), _style(place), markersize=3)
        axes.set_ylim(-IN_FRAME / 2, IN_FRAME / 2)
        _logarithmic(axes)
        axes.set_xlabel(label)
        axes.set_ylabel(f"held-out nats above {study.names.get(reference, reference)} at equal cost")
        axes.set_title("what is farther off is outside the frame", fontsize=8, loc="right")
        axes.grid(alpha=0.3)

    return [differences, losses] if of else [losses]


def _points(records: Records, arm: str, cost: str) -> dict[int, np.ndarray]:
    """Returns the curve of each seed, [2, points]: cost and loss. Leaves out curves with a single point, and runs without
    this cost (for example, a single rank sends no bytes)."""
    return {
        seed: np.array([[point[cost], point["loss"]["all"]] for point in record["curve"]]).T
        for (name, seed), record in sorted(records.items())
        if name == arm and len(curve := record.get("curve", [])) > 1 and curve[0].get(cost)
    }


def _averaged(curves: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the mean of the curves of all seeds, at the points that all curves have."""
    every = list(curves)
    points = min(curve.shape[1] for curve in every)
    mean = np.mean([curve[:, :points] for curve in every], axis=0)
    return mean[:, ~np.isnan(mean[1])]


def _logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _style(place: int) -> str:
    """Returns matplotlib's marker and line style for arm number `place`."""
    return STYLES[place % len(STYLES)]


def _accuracies(axes: "Axes", study: Study, records: Records, key: str, label: str) -> None:
    """Draws a row for each arm. The row has a dot for the accuracy of each seed, and a line at the mean."""
    found = {name: [each[key]["accuracy"] for each in of_arm(records, name).values() if key in each] for name in study.arms}
    names = [name for name, values in found.items() if values]
    for place, name in enumerate(names):
        axes.plot(found[name], [place] * len(found[name]), "o", markersize=4, color="C0", alpha=0.6)
        axes.plot(_mean(found[name]), place, "|", markersize=14, color="C1")
    axes.set_yticks(range(len(names)), [_name(study, name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def _total(row: dict[str, Any]) -> float:
    """Returns the mean number of true experts per token in a bin, over text and image tokens."""
    parts = [row[name] for name in ("text", "image") if row[name]["tokens"]]
    tokens = [part["tokens"] for part in parts]
    return float(np.average([part["load"] for part in parts], weights=tokens)) if parts else float("nan")


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))
