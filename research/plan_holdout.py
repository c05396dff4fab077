"""Compares the step model of `moe-dist plan` with measured layouts. Fits the model to half of the layouts, and predicts
the other half.

    python -m research.plan_holdout FOLDER --rates rates.yaml           # measures the missing layouts, then judges
    python -m research.plan_holdout FOLDER --rates rates.yaml --judge   # judges the existing measurements

The command needs the prepared data of the default job. docs/planning.md has the pass rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from moe_dist.config.schema import Config
from moe_dist.errors import DataError
from moe_dist.monitor.report.numbers import traffic
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.estimate import LIBRARIES, SLACK, Estimate, LayoutEstimator
from moe_dist.plan.memory import ITEMSIZE
from moe_dist.plan.rates import Rates, ScaleSection, read_rates
from moe_dist.plan.rows import EXCHANGES, Traced
from moe_dist.runtime.command_line import reports_errors, run_command
from research.bench.layout_steps import MeasuredLayout, measure, visits

CONFIG = "adamoe_moma_tiny_cpu"
MEDIAN, WORST, TAU, MEMORY = 0.10, 0.20, 0.9, 0.05  # pass rule: largest errors, smallest rank correlation, memory error
RECOMPUTE = ("none", "experts", "block")
Clock = Literal["cpu", "wall"]
_DISPATCH, _MIX = "parallel.dispatch", "data.weights={{openmoji: {}, python: {}}}"


def _layout(*overrides: str, workload: str | None = None) -> MeasuredLayout:
    return MeasuredLayout(CONFIG, ("placement.policy=interleaved", *overrides), workload)


def _choices(top_k: int, num_null: int) -> tuple[str, ...]:
    return tuple(
        f"model.moe.groups.{group}.{key}={number}"
        for group in ("text", "image")
        for key, number in (("top_k", top_k), ("num_null", num_null))
    )


# Each layout differs from the next one in one factor. The layouts at even places therefore vary every factor, and so do the
# layouts at odd places. The workload W4 is left out, because its ranks have different numbers of tokens, unlike the ranks
# of a training step.
LAYOUTS: tuple[MeasuredLayout, ...] = (
    *(_layout(f"parallel.ep={n}", f"parallel.recompute={each}") for n in (1, 2, 4) for each in RECOMPUTE),
    *(_layout(f"parallel.ep={ep}", *_choices(4, number)) for number in (0, 8, 72) for ep in (2, 4)),
    *(_layout("parallel.ep=2", f"{_DISPATCH}.chunks={chunks}") for chunks in (2, 4)),
    *(_layout("parallel.ep=2", f"{_DISPATCH}.overlap=true", f"{_DISPATCH}.chunks={chunks}") for chunks in (1, 2)),
    *(_layout("parallel.ep=2", _MIX.format(share, round(1 - share, 2))) for share in (0.1, 0.9)),
    *(
        _layout(f"parallel.ep={ep}", *_choices(2, 0), workload=name)
        for name, ep in zip(("W0", "W1", "W2", "W3", "W5", "W6", "W7"), (2, 2, 2, 2, 4, 4, 4), strict=True)
    ),
    _layout("parallel.ep=4", f"{_DISPATCH}={{kind: hierarchical, ranks_per_node: 2}}"),
    _layout("parallel.ep=4", f"{_DISPATCH}.chunks=2"),
    _layout("parallel.ep=2", "parallel.edp=2"),
    _layout("parallel.ep=2", "placement.policy=pinned"),
    _layout("parallel.ep=4", "placement.policy=pinned"),
)  # fmt: skip


@dataclass(frozen=True)
class Observed:
    """The measurements of one layout.

    Attributes:
        seconds: Seconds of a step, by clock. `cpu` is CPU time: the mean over ranks and the lower quartile over steps.
            `wall` is the wall time of the shortest step, because other load of the machine only makes steps longer.
        spread: Relative difference between the median over steps and `seconds`, by clock.
        sent, replayed: Number of bytes that the traced step sent, and that `replay` counts for the traced expert choices.
        memory: Peak bytes of all tensors in a step, on the fullest rank.
    """

    name: str
    config: Config
    placement: ExpertPlacement
    source: Traced
    mix: dict[str, int]
    seconds: dict[Clock, float]
    spread: dict[Clock, float]
    sent: int
    replayed: int
    memory: float


@reports_errors("plan_holdout")
def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the measurements.")],
    rates: Annotated[Path, typer.Option(help="Rates that moe-dist calibrate measured on this machine.")],
    rounds: Annotated[int, typer.Option(min=1, help="How often each layout is measured.")] = 3,
    judge: Annotated[bool, typer.Option("--judge", help="Measure nothing; judge what is there.")] = False,
) -> None:
    """Measure layouts, and compare predicted with measured seconds, bytes and memory. The exit code is 1 if the pass rule
    fails."""
    if not judge:
        measure(LAYOUTS, folder, rounds)
    passed, lines = judged(observed(folder), read_rates(rates))
    print("\n".join(lines))
    raise typer.Exit(0 if passed else 1)


def observed(folder: Path) -> list[Observed]:
    """Reads the measurements that `measure` stored. Returns them in the order of `LAYOUTS`."""
    of_layout: dict[int, list[dict]] = {}
    for visit in visits(folder / "visits.jsonl"):
        of_layout.setdefault(visit["layout"], []).append(visit)
    found = []
    for number, visited in sorted(of_layout.items()):
        plan = LAYOUTS[number].checked()
        config, parallel = plan.config, plan.config.parallel
        ranks = [np.load(path) for path in sorted(folder.glob(f"layout_{number:02d}_rank_*.npz"))]
        ids_TLK, sequence_T, modality_T = (
            np.concatenate([rank[key] for rank in ranks]) for key in ("ids_TLK", "sequence_T", "modality_T")
        )
        clocks: dict[Clock, np.ndarray] = {
            "cpu": np.concatenate([np.mean(visit["cpu"], 0) for visit in visited]),
            "wall": np.concatenate([visit["seconds"] for visit in visited]),
        }
        seconds: dict[Clock, float] = {"cpu": float(np.quantile(clocks["cpu"], 0.25)), "wall": float(clocks["wall"].min())}
        nodes = parallel.dispatch.node_size
        node = nodes or parallel.ep
        counted = traffic(ids_TLK, sequence_T, plan.placement, (node,), micro_batch=config.train.micro_batch)
        row_bytes = EXCHANGES[parallel.recompute] * config.model.hidden_dim * ITEMSIZE[parallel.precision]
        first = visited[0]
        found.append(
            Observed(
                LAYOUTS[number].name,
                config,
                plan.placement,
                Traced(ids_TLK, sequence_T),
                dict(zip(plan.manifest.modalities, np.bincount(modality_T, minlength=2).tolist(), strict=True)),
                seconds,
                {clock: float(np.median(values)) / seconds[clock] - 1 for clock, values in clocks.items()},
                sent=first["sent"][1 if nodes else 0],
                replayed=row_bytes * (counted.between_hierarchical[node] if nodes else counted.rows),
                memory=max(first["memory"]),
            )
        )
    return found


class Predicted:
    """Estimates the step times and the memory of runs. Values that do not depend on the fitted factors are computed only
    once."""

    def __init__(self, runs: Sequence[Observed], rates: Rates) -> None:
        self._runs = [(run, LayoutEstimator(rates, run.source, run.mix, rates.memory)) for run in runs]

    def __call__(self, rates: Rates) -> list[Estimate]:
        found = []
        for run, planner in self._runs:
            planner.take(rates)
            found.append(planner.estimate(run.config, run.placement))
        return found


def seconds_of(estimates: Sequence[Estimate], clock: Clock) -> np.ndarray:
    """Returns the predicted seconds of a step. For the clock `cpu`, these are the seconds in which an average rank
    computes, exchanges rows or sums gradients."""
    return np.array([e.seconds if clock == "wall" else e.busy + e.wire + e.tail for e in estimates])


def peak_of(estimate: Estimate) -> float:
    """Returns the predicted bytes of tensors. Leaves out the bytes that the estimate adds for allocator and libraries."""
    return (estimate.memory[0] - LIBRARIES) / (1 + SLACK)


FACTORS = ("dense", "experts", "launch", "recompute", "exchange")


def fitted(rates: Rates, seconds: Callable[[Rates], np.ndarray], measured: np.ndarray, rounds: int = 8) -> Rates:
    """Fits the factors of `ScaleSection` to measured seconds by Gauss-Newton steps on the logarithms of seconds. A small
    penalty keeps a factor at 1 if no run depends on the factor."""
    count = len(FACTORS) + 1  # the last value is 1 + ScaleSection.step / (the shortest measured step)
    logs, shortest = np.zeros(count), float(measured.min())

    def with_scale(values: np.ndarray) -> Rates:
        factors = dict(zip(FACTORS, np.exp(values[:-1]).tolist(), strict=True))
        scale = ScaleSection(**factors, step=max(0.0, float(np.exp(values[-1])) - 1) * shortest)
        return rates.model_copy(update={"scale": scale, "source": "fitted"})

    for _ in range(rounds):
        now = np.log(seconds(with_scale(logs)))
        moved = [np.log(seconds(with_scale(logs + 0.02 * unit))) for unit in np.eye(count)]
        slope = np.stack([(each - now) / 0.02 for each in moved], axis=1)
        pull = 1e-3 * np.eye(count)
        change = np.linalg.solve(slope.T @ slope + pull, slope.T @ (np.log(measured) - now) - pull @ logs)
        logs = np.clip(logs + np.clip(change, -1.0, 1.0), [-6.0] * (count - 1) + [0.0], 6.0)
    return with_scale(logs)


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Returns Kendall's rank correlation: (concordant - discordant pairs) / all pairs."""
    upper = np.triu_indices(len(one), 1)
    signs = np.sign(one[:, None] - one)[upper] * np.sign(other[:, None] - other)[upper]
    return float(signs.mean())


def judged(
    runs: Sequence[Observed],
    rates: Rates,
    predict: Callable[[Sequence[Observed], Rates], Callable[[Rates], Sequence[Estimate]]] = Predicted,
) -> tuple[bool, list[str]]:
    """For each clock, fits the step model to the runs at even places, and predicts the runs at odd places. Returns whether
    all rules hold, and the lines to print, with failed rules first."""
    if len(runs) < 4:
        raise DataError(f"{len(runs)} layouts: a fit and its test need at least four; run the command without --judge")
    learnt, held = predict(runs[::2], rates), predict(runs[1::2], rates)
    verdicts: list[tuple[str, bool]] = []
    lines: list[str] = []
    estimates: Sequence[Estimate] = ()
    for clock in ("cpu", "wall"):
        target, measured = (np.array([run.seconds[clock] for run in part]) for part in (runs[::2], runs[1::2]))
        fit = fitted(rates, lambda scaled, clock=clock: seconds_of(learnt(scaled), clock), target)
        estimates = held(fit)
        seconds = seconds_of(estimates, clock)
        error, tau = np.abs(seconds / measured - 1), kendall(seconds, measured)
        values = {
            "median error": (np.median(error), MEDIAN),
            "worst error": (error.max(), WORST),
            "1 - Kendall": (1 - tau, 1 - TAU),
        }
        verdicts += [
            (f"{clock}: {name} {at:.3f}, at most {bar:.2g}", bool(at <= bar + 1e-12)) for name, (at, bar) in values.items()
        ]
        lines.append(f"{clock}, fitted on {len(target)}: {fit.scale!r}")
        for i in np.argsort(-error):
            run = runs[1::2][i]
            lines.append(
                f"{clock} {run.name}: measured {measured[i]:.4f} s (median {run.spread[clock]:+.0%}), predicted "
                f"{seconds[i]:.4f} s, {seconds[i] / measured[i] - 1:+.1%}"
            )
    peaks = np.array([peak_of(each) for each in estimates])
    off = peaks / [run.memory for run in runs[1::2]] - 1
    verdicts.append(
        (f"memory: worst error {np.abs(off).max():.3f}, at most {MEMORY:.2g}", bool(np.abs(off).max() <= MEMORY))
    )
    wrong = [run.name for run in runs if run.sent != run.replayed]
    verdicts.append((f"bytes differ in {wrong or 'no layout'}", not wrong))
    lines += [
        f"memory {run.name}: measured {run.memory / 1e6:.1f} MB, predicted {peak / 1e6:.1f} MB, {each:+.1%}"
        for run, peak, each in zip(runs[1::2], peaks, off, strict=True)
    ]
    heads = [f"{'pass' if kept else 'FAIL'}: {text}" for text, kept in sorted(verdicts, key=lambda each: each[1])]
    return all(kept for _, kept in verdicts), [*heads, *lines]


if __name__ == "__main__":
    run_command(main)
