"""Compares methods at one budget. Writes the study file, which the experiments' runner runs, the table and the figure.

All methods have the same seeds, data, order of data, model and true experts. They differ in the router, and in the
mechanism that keeps the number of true experts per token at the budget. They may also differ in the learning rate, which
`research.experiments.rate_search` finds. Differences are paired by seed, and have lower and upper one-sided 95 % bounds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from moe_dist.config.load import load_config
from moe_dist.config.routers.top_k import TopKRouterSection
from moe_dist.config.schema import Config
from moe_dist.config.yaml_text import dump_yaml
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import load_manifest
from moe_dist.plan.preflight import check, layout_without_data
from moe_dist.runtime.files import write_atomically
from research.experiments.heldout import check_validation
from research.experiments.load_controls import SUFFIX, check_modalities, with_controls
from research.experiments.methods import METHODS, unnormalised
from research.experiments.rank_seconds import RankTime, check_ranks, read_rank_times
from research.experiments.report import commits, table
from research.experiments.results import read_header, results_path
from research.experiments.study import Study, config_of, find_file, fingerprint, jobs_of, load_study
from research.experiments.verdict_figure import save
from research.experiments.verdicts import Paired, Record, Records, number_at, of_arm, paired

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEQUENCES = 192  # number of held-out sequences of each source; with 64, loads on different documents differ by up to 9 %
OFF_BUDGET = 0.05  # if a method's load differs from the budget by a larger fraction, its losses cannot be compared
BYTES = 4  # size of an fp32 number
EXCHANGES = 4  # number of times that a row is sent: in dispatch and in combine, in forward and in backward
COLOUR, FAINT = "#0072B2", "#999999"  # colours of Okabe and Ito, for colour-blind readers
INCHES = (10.0, 7.5)


@dataclass(frozen=True)
class Comparison:
    """The command-line options of compare-methods."""

    name: str
    budget: float
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    base: str
    overrides: Mapping[str, Any]
    root: Path
    ranks: tuple[int, ...] = ()  # numbers of ranks on which steps are timed
    rates: tuple[float, ...] = ()  # learning rates to try for each method; if empty, all methods have the base's rate
    controls: bool = False  # whether each method is also compared with a control that has the same load per modality
    hold: bool = False  # whether loads are set to the budget after training, on validation sequences

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def study_path(self) -> Path:
        return self.folder / "study.yaml"

    @property
    def reference(self) -> str:
        """Returns the method with which all others are compared: `fixed` if it was requested, else the first method."""
        return "fixed" if "fixed" in self.methods else self.methods[0]


def make_study(asked: Comparison, rates: Mapping[str, float] | None = None) -> Study:
    """Writes the study's file unless the folder already has it. Returns the study.

    Args:
        rates: The learning rate of each method. With None, all methods have the base's rate.

    Raises:
        ConfigError: methods cannot reach the budget or cannot train on the configuration (the message lists all of them,
            with reasons); the folder has another comparison; or an option needs validation sequences, which the data lack.
    """
    values = study_values(asked)
    for name, rate in (rates or {}).items():
        values["arms"][name]["set"]["optimizer.lr"] = rate
    if asked.controls:
        base = _base(asked)
        check_modalities(load_manifest(base.data.path))
        most = {f"model.moe.groups.{name}.top_k": group.num_experts for name, group in base.model.moe.groups.items()}
        values["arms"] = with_controls(values["arms"], unnormalised(base, asked.budget), most)
    return write_study(asked, asked.study_path, values)


def study_values(asked: Comparison) -> dict[str, Any]:
    """Returns the contents of a study's file. Raises ConfigError as `make_study` does."""
    base = _base(asked)
    _check_base(base)
    unknown = [name for name in asked.methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {', '.join(unknown)}: the methods are {', '.join(METHODS)}")
    twice = sorted({name for name in asked.methods if asked.methods.count(name) > 1})
    if twice or len(asked.methods) < 2 or len(set(asked.seeds)) < len(asked.seeds) or len(asked.seeds) < 2:
        raise ConfigError(
            f"--methods {','.join(asked.methods)} --seeds {','.join(map(str, asked.seeds))}: a comparison needs two "
            "methods and two seeds at least, each named once"
        )
    problems = [
        f"{name}: {problem}"
        for name in asked.methods
        for group in base.model.moe.groups.values()
        if (problem := METHODS[name].refused(group, asked.budget))
    ]
    if problems:
        raise ConfigError([*problems, f"--budget {asked.budget:g} --methods: take another budget, or leave them out"])
    return {
        "name": asked.name,
        "question": f"{len(asked.methods)} methods at {asked.budget:g} true experts per token",
        "base": asked.base,
        "set": dict(asked.overrides),
        "seeds": {"decisive": list(asked.seeds), "other": list(asked.seeds)},
        "pilot": {"seeds": [max(asked.seeds) + 100]},
        "measure": {"accuracy": True, "sequences": SEQUENCES, **({"hold": asked.budget} if asked.hold else {})},
        "runs": str(asked.root),
        "records": str(asked.folder),
        "arms": {
            name: {"about": METHODS[name].about, "seeds": "decisive", "set": METHODS[name].settings(base, asked.budget)}
            for name in asked.methods
        },
    }


def _base(asked: Comparison) -> Config:
    return load_config(find_file(asked.base), [f"{key}={json.dumps(value)}" for key, value in asked.overrides.items()])


def write_study(asked: Comparison, path: Path, values: Mapping[str, Any]) -> Study:
    """Writes and checks a study's file. Raises ConfigError as `make_study` does."""
    text = dump_yaml(values)
    if path.exists() and path.read_text() != text:
        raise ConfigError(
            f"{path} is of another comparison (other methods, seeds, budget, rates or settings), and nothing is "
            "overwritten; give another --name"
        )
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    study = load_study(path)
    headers = [read_header(results_path(study, pilot=pilot)) for pilot in (False, True)]
    if any(header is not None and header["fingerprint"] != fingerprint(path, study) for header in headers):
        raise ConfigError(
            f"{study.base} has changed since the finished runs in {asked.folder}, and new runs would not compare; put it "
            "back, or give another --name"
        )
    _check_arms(study)
    check_ranks(study, asked.ranks)
    _check_validation(asked, study)
    return study


def _check_validation(asked: Comparison, study: Study) -> None:
    """Raises ConfigError if an option needs validation sequences, but all held-out sequences of the data are already used
    for measurements."""
    options = [name for name, given in (("--rates", asked.rates), ("--hold", asked.hold)) if given]
    try:
        if options:
            check_validation(study.measure, config_of(study, jobs_of(study)[0]))
    except ConfigError as error:
        way_out = f"{', '.join(options)}: leave it out, or give data with more held-out documents"
        raise ConfigError([*error.problems, way_out]) from error


def _check_base(base: Config) -> None:
    """Raises ConfigError for a configuration on which the methods cannot be compared."""
    moe, reasons = base.model.moe, []
    if len({group.num_experts for group in moe.groups.values()}) > 1:
        reasons.append("model.moe.groups have different numbers of experts, so that one budget is not one share of them")
    for name, group in moe.groups.items():
        if group.num_null or group.num_zero_computation:
            reasons.append(
                f"model.moe.groups.{name} has null or zero-computation experts, which the methods set themselves"
            )
    if moe.balance or moe.router != TopKRouterSection():
        reasons.append("model.moe.router and model.moe.balance must have their defaults; the methods set them")
    if base.loss.balance.kind != "null_averaged" or base.loss.balance.null_weight:
        reasons.append("loss.balance.kind and null_weight must have their defaults; the methods set them")
    if base.model.mixture_of_depths is not None:
        reasons.append("model.mixture_of_depths decides, too, which tokens are computed; set it to null")
    if base.train.only is not None or moe.experts.kind != "ffn":
        reasons.append("the methods train whole models; set train.only to null and model.moe.experts.kind to ffn")
    if reasons:
        raise ConfigError([f"{base.run.name}: methods cannot be compared: {reason}" for reason in reasons])


def _check_arms(study: Study) -> None:
    """Raises one ConfigError that names all methods whose configuration breaks a rule."""
    problems = []
    for job in {job.label: job for job in jobs_of(study)}.values():
        try:
            config = config_of(study, job)
            if job.arm.measured:
                layout_without_data(config)  # a finished run makes the table of loads
            else:
                check(config, world_size=1)
        except ConfigError as error:
            problems.append(f"{job.label}: {error}")
    if problems:
        raise ConfigError([*problems, "leave these methods out, or change the configuration"])


# --- table and figure


def write_comparison(asked: Comparison, study: Study, records: Records) -> str:
    """Writes table.md and the figure from the existing records, and returns the table."""
    text = table_text(asked, study, records)
    write_atomically(asked.folder / "table.md", text)
    if any(of_arm(records, name) for name in asked.methods):
        draw(asked, records, asked.folder / "figure.svg")
    return text


def table_text(asked: Comparison, study: Study, records: Records) -> str:
    """Returns a sentence about the runs, and the table in Markdown format."""
    rows, times = [], read_rank_times(asked.folder)
    ranks = sorted({number for _, number in times})
    exchanging = [number for number in ranks if number > 1]
    rates = {name: arm.set["optimizer.lr"] for name, arm in study.arms.items() if "optimizer.lr" in arm.set}
    for name in asked.methods:
        mine = of_arm(records, name)
        rows.append(
            [
                f"`{name}`",
                METHODS[name].about,
                *([f"{rates[name]:g}"] if rates else []),
                str(len(mine)),
                _load(mine) + (" (off budget)" if _off_budget(asked, mine) else ""),
                _text(_mean(mine, "load.by_input.text"), 2) + " / " + _text(_mean(mine, "load.by_input.image"), 2),
                _text(_mean(mine, "loss.all"), 4),
                _difference(records, name, asked.reference, "loss.all", 4),
                *([_difference(records, name, f"{name}{SUFFIX}", "loss.all", 4)] if asked.controls else []),
                _text(_mean(mine, "accuracy.all", 100.0), 2),
                _difference(records, name, asked.reference, "accuracy.all", 2, 100.0),
                *([_difference(records, name, f"{name}{SUFFIX}", "accuracy.all", 2, 100.0)] if asked.controls else []),
                _text(_average([each["flops"] / each["tokens"] / 1e6 for each in mine.values()]), 2),
                *([] if exchanging else [_text(_average([_sent(study, each) for each in mine.values()]), 2)]),
                *(_text(time.kilobytes if (time := times.get((name, number))) else None, 2) for number in exchanging),
                *(_seconds(times.get((name, number))) for number in ranks),
            ]
        )
    less_control = ["less its loads by modality"] if asked.controls else []
    heads = [
        "method", "what", *(["learning rate"] if rates else []), "seeds",
        "true experts per token [lowest, highest seed]", "text / image",
        "loss, nats", f"less {asked.reference}", *less_control,
        "accuracy, %", f"less {asked.reference}", *less_control, "training MFLOP per token",
        *([] if exchanging else [f"kB sent per held-out token at EP {study.measure.wire.ep}"]),
        *(f"kB sent per token in training, EP {number}" for number in exchanging),
        *(f"seconds of a step, EP {number}" for number in ranks),
    ]  # fmt: skip
    rounds = max((len(time.seconds) for time in times.values()), default=0)
    many = f"seconds are the median, lowest and highest of {rounds} rounds; "
    timed = {0: "", 1: "seconds are those of one round; "}.get(rounds, many)
    end = timed + (f"the runs used the code of {commits(records.values())}" if records else "no run is finished")
    lines = [
        f"The budget is {asked.budget:g} true experts per token and layer. The seeds are "
        f"{', '.join(map(str, asked.seeds))}. Differences are paired by seed; brackets contain their lower and upper "
        f"one-sided 95 % bounds. {end[0].upper()}{end[1:]}.",
        "",
        *table(heads, rows),
        "",
    ]
    return "\n".join(lines)


def _load(mine: Mapping[int, Record]) -> str:
    loads = [each["load"]["all"] for each in mine.values()]
    return f"{sum(loads) / len(loads):.3f} [{min(loads):.3f}, {max(loads):.3f}]" if loads else "-"


def _off_budget(asked: Comparison, mine: Mapping[int, Record]) -> bool:
    load = _mean(mine, "load.all")
    return load is not None and abs(load / asked.budget - 1.0) > OFF_BUDGET


def _sent(study: Study, record: Record) -> float:
    """Returns how many kB of fp32 rows a token sends in all layers, in dispatch and combine, in forward and backward."""
    model = config_of(study, jobs_of(study)[0]).model
    return record["wire"]["rows_remote"] * len(model.moe_layers) * model.hidden_dim * BYTES * EXCHANGES / 1e3


def differences(records: Records, name: str, of: str, metric: str, factor: float = 1.0) -> list[float]:
    """Returns a metric of method `name` minus the same metric of method `of`, for each seed that both methods have."""
    mine, theirs = of_arm(records, name), of_arm(records, of)
    pairs = [(number_at(mine[seed], metric), number_at(theirs[seed], metric)) for seed in mine if seed in theirs]
    return [factor * (one - other) for one, other in pairs if one is not None and other is not None]


def _paired(records: Records, name: str, of: str, metric: str, factor: float = 1.0) -> Paired | None:
    found = differences(records, name, of, metric, factor)
    return paired(found) if len(found) > 1 and name != of else None


def _difference(records: Records, name: str, of: str, metric: str, digits: int, factor: float = 1.0) -> str:
    found = _paired(records, name, of, metric, factor)
    if found is None:
        return "-"
    return f"{found.mean:+.{digits}f} [{found.lower:+.{digits}f}, {found.upper:+.{digits}f}]"


def _mean(mine: Mapping[int, Record], metric: str, factor: float = 1.0) -> float | None:
    return _average([factor * value for each in mine.values() if (value := number_at(each, metric)) is not None])


def _average(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _seconds(time: RankTime | None) -> str:
    if time is None:
        return "-"
    bounds = f" [{min(time.seconds):.3f}, {max(time.seconds):.3f}]" if len(time.seconds) > 1 else ""
    return f"{median(time.seconds):.3f}{bounds}"


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def draw(asked: Comparison, records: Records, path: Path) -> None:
    """Writes the figure. It shows for each method the differences of loss and accuracy with bounds, and the experts per
    token of each seed. If they were measured, it also shows the kB and seconds of each round on the largest number of
    ranks. Methods off the budget have hollow marks."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # import takes seconds; needs no window system

    times = read_rank_times(asked.folder)
    most = max((number for _, number in times), default=0)
    rows = 2 if most else 1
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(INCHES[0], INCHES[1] * rows / 2), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False)
        loss, accuracy, load = panels[0]
        _bounds(loss, asked, records, "loss.all", "held-out loss, nats", 1.0)
        _bounds(accuracy, asked, records, "accuracy.all", "held-out accuracy, points", 100.0)
        loads = {name: [each["load"]["all"] for each in of_arm(records, name).values()] for name in asked.methods}
        _dots(load, asked, records, loads, "true experts per token (dashed: budget)")
        load.axvline(asked.budget, color="black", linewidth=0.8, linestyle="--")
        found = {name: times[name, most] for name in asked.methods if (name, most) in times}
        if most:
            seconds = {name: time.seconds for name, time in found.items()}
            _dots(panels[1][0], asked, records, seconds, f"seconds of a step, EP {most}")
            for empty in panels[1][2 if most > 1 else 1 :]:
                empty.set_axis_off()
        if most > 1:
            kilobytes = {name: [time.kilobytes] for name, time in found.items()}
            _dots(panels[1][1], asked, records, kilobytes, f"kB sent per token in training, EP {most}")
        for others in (panels[0][1:], panels[1][1:] if most else []):
            for axes in others:
                axes.set_yticklabels([])
        figure.suptitle(
            f"{asked.budget:g} true experts per token; loss and accuracy less {asked.reference}'s, paired by seed; "
            "hollow: off budget"
        )
    save(figure, path)


def _fill(asked: Comparison, records: Records, name: str) -> str:
    return "white" if _off_budget(asked, of_arm(records, name)) else COLOUR


def _bounds(axes: "Axes", asked: Comparison, records: Records, metric: str, label: str, factor: float) -> None:
    for place, name in enumerate(asked.methods):
        found = _paired(records, name, asked.reference, metric, factor)
        if found is not None:
            seeds = differences(records, name, asked.reference, metric, factor)
            axes.plot(seeds, [place] * len(seeds), ".", color=FAINT)
            reach = [[found.mean - found.lower], [found.upper - found.mean]]
            fill = _fill(asked, records, name)
            axes.errorbar(found.mean, place, xerr=reach, fmt="o", color=COLOUR, mfc=fill, capsize=3, markersize=5)
    axes.axvline(0.0, color="black", linewidth=0.8)
    _rows(axes, asked, label)


def _dots(axes: "Axes", asked: Comparison, records: Records, values: Mapping[str, Sequence[float]], label: str) -> None:
    for place, name in enumerate(asked.methods):
        found = values.get(name, ())
        axes.plot(found, [place] * len(found), "o", color=COLOUR, mfc=_fill(asked, records, name), markersize=4)
    _rows(axes, asked, label)


def _rows(axes: "Axes", asked: Comparison, label: str) -> None:
    axes.set_yticks(range(len(asked.methods)), asked.methods)
    axes.set_ylim(len(asked.methods) - 0.5, -0.5)  # the first method on top
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
