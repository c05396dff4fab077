"""Holds the step model of `moe-dist plan` to measured runs: fits it on half of 24 layouts, and predicts the other half.

    python -m tools.plan_holdout FOLDER --rates rates.yaml           # runs what FOLDER lacks, then judges
    python -m tools.plan_holdout FOLDER --rates rates.yaml --judge   # judges the runs that are there

Needs the prepared data of the default job, and a machine that does nothing else. docs/planning.md has the pass rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from launchers.local import launch
from moe_dist.config.bundled import find_config
from moe_dist.config.load import load_stored_config
from moe_dist.config.schema import Config
from moe_dist.errors import DataError, ResourceError
from moe_dist.monitor.report.replay import replay
from moe_dist.monitor.report.routing import Routing
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.plan.estimate import Planner
from moe_dist.plan.memory import ITEMSIZE
from moe_dist.plan.rates import Rates, ScaleSection, read_rates
from moe_dist.plan.rows import Traced
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.run_folder import RunFolder
from tools.report import open_routing

CONFIG, STEPS, WARMUP = "adamoe_moma_tiny_cpu", 24, 4
MEDIAN, WORST, TAU = 0.10, 0.20, 0.9  # pass rule: errors of predicted seconds at most, rank correlation at least
COMMON = (
    f"train.steps={STEPS}", "evaluation.every=1000", "evaluation.final_sequences=8", "evaluation.sequences=8",
    "evaluation.checks=[]", "evaluation.ablate_experts=false", "evaluation.balance_efficiency=false",
    "checkpoint.every=1000", "monitor={trace: {every: 1}, sinks: [{kind: jsonl}]}", "placement.policy=interleaved",
)  # fmt: skip
_DISPATCH, _NULL, _MIX = "parallel.dispatch", "model.moe.groups.{}.num_null={}", "data.weights={{openmoji: {}, python: {}}}"


def _nulls(number: int) -> tuple[str, str]:
    return _NULL.format("text", number), _NULL.format("image", number)


# Neighbours differ in one factor, so that both halves (even and odd places) have every factor.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    *((f"parallel.ep={ep}", f"parallel.recompute={again}") for ep in (1, 2, 4) for again in ("none", "experts", "block")),
    *((f"parallel.ep={ep}", *_nulls(number)) for number in (0, 8, 72) for ep in (1, 2)),
    *(("parallel.ep=2", f"{_DISPATCH}.chunks={chunks}") for chunks in (2, 4)),
    *(("parallel.ep=2", f"{_DISPATCH}.overlap=true", f"{_DISPATCH}.chunks={chunks}") for chunks in (1, 2)),
    *(("parallel.ep=2", _MIX.format(share, round(1 - share, 2))) for share in (0.1, 0.9)),
    ("parallel.ep=4", f"{_DISPATCH}={{kind: hierarchical, ranks_per_node: 2}}"),
    ("parallel.ep=2", "parallel.edp=2"),
    ("parallel.ep=2", "placement.policy=pinned"),
)


@dataclass(frozen=True)
class Observed:
    """One run: median seconds of its steps after the first `WARMUP`, and bytes of all steps, sent and replayed."""

    name: str
    config: Config
    routing: Routing
    seconds: float
    sent: int
    replayed: int


@reports_errors("plan_holdout")
def main(
    folder: Annotated[Path, typer.Argument(help="Folder of the runs.")],
    rates: Annotated[Path, typer.Option(help="Rates that moe-dist calibrate measured on this machine.")],
    judge: Annotated[bool, typer.Option("--judge", help="Run nothing; judge the runs that are there.")] = False,
) -> None:
    """Run 24 layouts, and compare predicted with measured seconds. Ends with exit code 1 if the pass rule is not kept."""
    for number, overrides in enumerate(() if judge else LAYOUTS):
        names = (f"run.root={folder}", f"run.name=layout_{number:02d}")
        if code := launch(find_config(CONFIG), [*COMMON, *overrides, *names]):
            raise ResourceError(
                f"layout {number} ({' '.join(overrides)}): the run ended with exit code {code}; read its log"
            )
    runs = [observed(path.parent) for path in sorted(folder.glob("layout_*/config.yaml"))]
    passed, lines = judged(runs, read_rates(rates))
    print("\n".join(lines))
    raise typer.Exit(0 if passed else 1)


def observed(path: Path) -> Observed:
    """Reads a run with a trace of all tokens of all steps."""
    config, routing = load_stored_config(path / "config.yaml"), open_routing(path)
    steps = [line for line in read_lines(RunFolder(path).metrics_jsonl) if line.get("kind") == "step"]
    tokens = routing.tokens
    if tokens is None or len(tokens.steps) != len(steps):
        raise DataError(f"{path}: not every step has a trace of all tokens; run it again with monitor.trace={{every: 1}}")
    parallel, seconds = config.parallel, [line["scalars"]["perf/step_seconds"] for line in steps]
    two_hops = parallel.dispatch.node_size is not None
    found = replay(
        tokens.ids_TLK,
        tokens.sequence_T,
        routing.placement,
        micro_batch=config.train.micro_batch,
        node_size=parallel.dispatch.node_size or parallel.ep,
        row_bytes=config.model.hidden_dim * ITEMSIZE[parallel.precision],
        repeated=int(parallel.recompute == "block"),
    )
    sent = sum(line["ledger"]["inter_node_bytes" if two_hops else "payload_bytes"] for line in steps)
    replayed = found.bytes_between_once if two_hops else found.bytes
    return Observed(path.name, config, routing, float(np.median(seconds[WARMUP:] or seconds)), sent, replayed)


def predicted(runs: Sequence[Observed], rates: Rates) -> np.ndarray:
    """Seconds of a step of each run by the step model, with rows drawn from the run's trace."""
    found = []
    for run in runs:
        tokens = run.routing.tokens
        assert tokens is not None
        counted = np.bincount(tokens.modality_T, minlength=len(run.routing.modalities))
        mix = dict(zip(run.routing.modalities, counted.tolist(), strict=True))
        planner = Planner(rates, Traced(tokens.ids_TLK, tokens.sequence_T), mix, rates.memory)
        found.append(planner.estimate(run.config, run.routing.placement).seconds)
    return np.array(found)


def fitted(rates: Rates, seconds_of: Callable[[Rates], np.ndarray], measured: np.ndarray, rounds: int = 8) -> Rates:
    """Fits the factors of `ScaleSection` to measured seconds, by Gauss-Newton steps on the logarithms of seconds. A small
    pull to 1 keeps a factor that no run shows there."""
    logs = np.zeros(4)  # of dense, experts, exchange, and 1 + seconds of a step / the shortest measured step
    shortest = float(measured.min())

    def with_scale(values: np.ndarray) -> Rates:
        dense, experts, exchange, rest = np.exp(values)
        scale = ScaleSection(dense=dense, experts=experts, exchange=exchange, step=max(0.0, rest - 1) * shortest)
        return rates.model_copy(update={"scale": scale, "source": "fitted"})

    for _ in range(rounds):
        now = np.log(seconds_of(with_scale(logs)))
        moved = [np.log(seconds_of(with_scale(logs + 0.02 * unit))) for unit in np.eye(4)]
        slope = np.stack([(each - now) / 0.02 for each in moved], axis=1)
        pull = 1e-3 * np.eye(4)
        change = np.linalg.solve(slope.T @ slope + pull, slope.T @ (np.log(measured) - now) - pull @ logs)
        logs = np.clip(logs + np.clip(change, -1.0, 1.0), [-6.0, -6.0, -6.0, 0.0], 6.0)
    return with_scale(logs)


def kendall(one: np.ndarray, other: np.ndarray) -> float:
    """Kendall's rank correlation: concordant minus discordant pairs over all pairs."""
    upper = np.triu_indices(len(one), 1)
    signs = np.sign(one[:, None] - one)[upper] * np.sign(other[:, None] - other)[upper]
    return float(signs.mean())


def judged(
    runs: Sequence[Observed],
    rates: Rates,
    predict: Callable[[Sequence[Observed], Rates], np.ndarray] = predicted,
) -> tuple[bool, list[str]]:
    """Fits on runs at even places and predicts those at odd places. Returns whether the pass rule is kept, and lines, with
    failures first."""
    if len(runs) < 4:
        raise DataError(f"{len(runs)} runs: a fit and its test need at least four; run the command without --judge")
    learnt, held = runs[::2], runs[1::2]
    fit = fitted(rates, lambda scaled: predict(learnt, scaled), np.array([run.seconds for run in learnt]))
    seconds, measured = predict(held, fit), np.array([run.seconds for run in held])
    error, tau = np.abs(seconds / measured - 1), kendall(seconds, measured)
    values = {
        "median error": (np.median(error), MEDIAN),
        "worst error": (error.max(), WORST),
        "1 - Kendall": (1 - tau, 1 - TAU),
    }
    wrong = [run.name for run in runs if run.sent != run.replayed]
    verdicts = [(f"{name} {at:.3f}, at most {bar:.2g}", bool(at <= bar + 1e-12)) for name, (at, bar) in values.items()]
    verdicts.append((f"bytes differ in {wrong or 'no run'}", not wrong))
    lines = [f"{'pass' if kept else 'FAIL'}: {text}" for text, kept in sorted(verdicts, key=lambda each: each[1])]
    order = np.argsort(-error)
    lines += [f"{held[i].name}: measured {measured[i]:.4f} s, predicted {seconds[i]:.4f} s, {error[i]:.1%}" for i in order]
    return all(kept for _, kept in verdicts), [*lines, f"fitted on {len(learnt)}: {fit.scale!r}"]


if __name__ == "__main__":
    run_command(main)
