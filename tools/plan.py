"""Ranks layouts of a configuration by simulated step time, and writes the best layout's configuration. See
docs/planning.md."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from moe_dist.config.base.section import named
from moe_dist.config.cluster import VARIABLE, cluster_file, load_cluster
from moe_dist.config.engines.base import EngineSection
from moe_dist.config.load import load_config, model_violations, resolved_yaml, rule_violations
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.monitor.report.numbers import traffic
from moe_dist.monitor.report.routing import Routing, model_shape
from moe_dist.plan.answers import answers, best_of_each, hot_expert, modality_answer, picture
from moe_dist.plan.estimate import Estimate, LayoutEstimator
from moe_dist.plan.layouts import Placements, gpu_counts, layouts
from moe_dist.plan.memory import ITEMSIZE
from moe_dist.plan.policies import expert_groups
from moe_dist.plan.preflight import layout_without_data
from moe_dist.plan.rates import GUIDE, Rates, published_rates, read_rates
from moe_dist.plan.rows import EXCHANGES, Expected, Traced, group_starts
from moe_dist.plan.solver import slots_of, solve
from moe_dist.runtime.command_line import print_done, reports_errors, run_command, takes
from moe_dist.runtime.files import make_writable, write_atomically

LIKELY = 0.01  # a layout is ranked only if it runs out of memory with at most this probability
SHOWN = 10


@dataclass(frozen=True)
class PlanOptions:
    config: Annotated[Path, typer.Argument(help="YAML file of the run, or its name in configs/.")]
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in train.global_batch=4096.")] = None
    gpus: Annotated[
        str | None,
        typer.Option(help="Number of GPUs, or a range whose doublings are taken, as 8..10240; by default the configured."),
    ] = None
    trace: Annotated[Path | None, typer.Option(help="A run or trace of this model, for real routing.")] = None
    cluster: Annotated[str | None, typer.Option(help="Cluster file with gpus.type and between_gbytes.")] = None
    rates: Annotated[Path | None, typer.Option(help="Rates that moe-dist calibrate measured.")] = None
    machine: Annotated[str, typer.Option(help="Machine of --rates, if it is not this one.")] = platform.node()
    memory: Annotated[float | None, typer.Option(min=0.1, help="Memory of a GPU in GB; by default the card's.")] = None
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of a GPU for an hour.")] = None
    out: Annotated[Path, typer.Option("--out", "-o", help="Configuration of the best layout; its picture: .svg.")] = Path(
        "plan.yaml"
    )


@reports_errors("plan")
@takes(PlanOptions)
def main(options: PlanOptions) -> None:
    """Rank layouts by simulated step time."""
    if options.out.suffix != ".yaml":
        raise ConfigError(f"--out {options.out}: the name must end with .yaml; take plan.yaml")
    make_writable(options.out.parent, option=f"--out {options.out}")
    planned = layout_without_data(load_config(options.config, options.overrides or ()))
    configured = planned.config.parallel.ep * planned.config.parallel.edp
    counts = gpu_counts(*gpu_range(str(configured) if options.gpus is None else options.gpus))
    config, mix, rates = planned.config, dict(planned.token_mix), rates_of(options, max(counts))
    if not config.engine.planned:
        refuse_unused(options, config.engine)
        list_layouts, memory = named(config.engine.layouts), most_memory(options, rates)
        best = list_layouts(config, counts, mix, node=rates.ranks_per_node, most=memory)
        write_plan(best.config, options.out)
        options.out.with_suffix(".svg").unlink(missing_ok=True)  # a picture of an earlier plan shows other layouts
        print_done(f"{options.out}; {_launch(best.config, options.out, rates.ranks_per_node)}")
        return
    source, routing = Expected(mix), None
    if options.trace is not None:
        routing = routing_of(options.trace, config)
        assert routing.tokens is not None
        source = Traced(routing.tokens.ids_TLK, routing.tokens.sequence_T)
        counted = np.bincount(routing.tokens.modality_T, minlength=len(routing.modalities))
        mix = dict(zip(routing.modalities, counted.tolist(), strict=True))
    most = most_memory(options, rates)
    planner, load_LE = LayoutEstimator(rates, source, mix, most), None
    if isinstance(source, Traced):
        width_E = planned.placement.width_of_expert
        load_LE = source.pairs_of_experts(len(width_E)).sum(0) * np.array(width_E)
    placements = Placements(config, mix, None if load_LE is None else lambda ep: solved_slots(load_LE, ep))
    every = [planner.estimate(*each) for count in counts for each in layouts(config, count, rates, placements)]
    fitting = [each for each in every if each.out_of_memory <= LIKELY]
    if not fitting:
        raise no_layout(config, counts, every, most)
    ranked = sorted(fitting, key=lambda each: cost(each, options.price))
    best = next((each for each in ranked if not problems_of(each)), None)
    if best is None:
        raise ConfigError(
            f"--gpus {options.gpus or configured}: {len(ranked)} layouts fit into memory, but each breaks a rule; the "
            f"nearest is {ranked[0].name}, and {problems_of(ranked[0])[0]}",
            see=GUIDE,
        )
    print_plan(ranked, best, len(every), rates, options)
    if routing is not None:
        print_replay(routing, ranked, rates)
    says = [*left_out(config, counts, every, fitting), *answers(best, fitting, rates), modality_answer(fitting, planner)]
    if load_LE is not None and routing is not None:
        spread = next((each for each in ranked if each.config.parallel.ep > 1), best)
        says.append(hot_expert(load_LE, routing.layers, spread.placement))
    console = Console(highlight=False)
    for sentence in filter(None, says):
        console.print(f"- {sentence}", markup=False, soft_wrap=not console.is_terminal)
    write_plan(best.config, options.out)
    unlike = best_of_each(ranked, lambda e: (e.config.parallel.ep, e.config.placement.policy, e.config.parallel.recompute))
    title = f"{config.run.name}: seconds of a step on {rates.card} ({rates.machine})"
    write_atomically(options.out.with_suffix(".svg"), picture(shown_of(ranked, unlike), title).encode())
    start = _launch(best.config, options.out, rates.ranks_per_node)
    print_done(f"{options.out}, {options.out.with_suffix('.svg')}; {start}")


def _launch(config: Config, path: Path, ranks_per_node: int) -> str:
    if config.parallel.ep * config.parallel.edp <= ranks_per_node:
        return f"start it with moe-dist launch local {path}"
    return f"start it with moe-dist launch slurm {path} --cluster SITE (or launch ray)"


def refuse_unused(options: PlanOptions, engine: EngineSection) -> None:
    """Raises ConfigError for options about step times if no step times are simulated for the engine. Also raises
    ConfigError if the layouts of the engine are unknown."""
    values = {"--trace": options.trace, "--price": options.price}
    if given := [name for name, value in values.items() if value is not None]:
        raise ConfigError(
            f"{', '.join(given)}: no step times are simulated for engine.kind={engine.kind}; leave the option out, or set "
            "engine.kind=moe_dist",
            see=GUIDE,
        )
    if not engine.layouts:
        raise ConfigError(
            f"engine.kind={engine.kind}: its layouts are not known; take a dry run (python -m moe_dist.train CONFIG "
            "--dry-run)",
            see=GUIDE,
        )


def most_memory(options: PlanOptions, rates: Rates) -> float:
    """Returns a GPU's bytes of memory: the value of `--memory`, else the memory of the card."""
    return options.memory * 1e9 if options.memory is not None else rates.memory


def write_plan(config: Config, path: Path) -> None:
    """Writes the configuration of a layout, and checks that the file reads back as the same configuration."""
    write_atomically(path, resolved_yaml(config).encode())
    assert load_config(path) == config


def problems_of(each: Estimate) -> list[str]:
    """Returns a message for each rule that the configuration of a layout breaks."""
    return [found.problem for found in (*rule_violations(each.config), *model_violations(each.config))]


def left_out(
    config: Config, counts: Sequence[int], every: Sequence[Estimate], fitting: Sequence[Estimate]
) -> Iterator[str]:
    """Yields a sentence for each reason why layouts on some numbers of GPUs are not ranked."""
    batch, listed, ranked = config.train.global_batch, {each.gpus for each in every}, {each.gpus for each in fitting}
    if odd := [count for count in counts if count not in listed]:
        numbers = ", ".join(map(str, odd))
        yield (
            f"{numbers} GPUs are left out, because train.global_batch={batch} is not a multiple of them; take "
            f"train.global_batch={-(-batch // max(odd)) * max(odd)} for {max(odd)}."
        )
    if full := [count for count in counts if count in listed - ranked]:
        nearest = min((each for each in every if each.gpus == full[-1]), key=lambda each: each.memory[2])
        yield (
            f"{', '.join(map(str, full))} GPUs are left out, because no layout fits; on {full[-1]} the nearest, "
            f"{nearest.name}, needs {nearest.memory[2] / 1e9:.1f} GB."
        )


def gpu_range(text: str) -> tuple[int, int]:
    """Reads `8` or `8..64`."""
    low, dots, high = text.partition("..")
    if not low.isdecimal() or not (high if dots else low).isdecimal():
        raise ConfigError(f"--gpus {text}: write a number or a range of whole numbers, as 64 or 8..10240", see=GUIDE)
    return int(low), int(high or low)


def rates_of(options: PlanOptions, gpus: int) -> Rates:
    """Returns the rates in the file `--rates`. Without it, returns published rates of the card in the cluster file
    `--cluster` or $MOE_DIST_CLUSTER; without a cluster file, of H100 nodes."""
    if options.rates is not None:
        rates = read_rates(options.rates)
        if rates.machine != options.machine:
            raise ConfigError(
                f"--rates {options.rates}: machine={rates.machine}, but this is {options.machine}; measure here with "
                f"moe-dist calibrate, or give --machine {rates.machine} to plan for that machine",
                see=GUIDE,
            )
        return rates
    named = options.cluster or os.environ.get(VARIABLE) or "h100_infiniband"
    given, cluster = cluster_file(named, os.environ), load_cluster(named, os.environ)
    card = cluster.gpus.type
    if cluster.gpus.syntax == "none" or card is None:
        raise ConfigError(
            f"{given}: gpus.type={card}: the plan needs the card for its rates; set gpus.type, as in h100, or measure "
            "rates with moe-dist calibrate and give --rates",
            see=GUIDE,
        )
    if gpus > cluster.gpus.per_node and cluster.between_gbytes is None:
        raise ConfigError(
            f"{given}: between_gbytes=null: {gpus} GPUs are more than the {cluster.gpus.per_node} of a node, so the plan "
            "needs the rate between nodes; set between_gbytes, as in 45 for 400 Gb/s a GPU",
            see=GUIDE,
        )
    peak, between = peak_tflops(card), cluster.between_gbytes
    return published_rates(
        card,
        None if peak is None else peak * 1e12,
        ranks_per_node=cluster.gpus.per_node,
        between=None if between is None else between * 1e9,
    )


def routing_of(path: Path, config: Config) -> Routing:
    """Reads the routing in a trace of the configuration's model."""
    from tools.report import open_routing  # imports torch, which a plan without a trace does not need

    routing, groups = open_routing(path, option="--trace"), expert_groups(config.model.moe)
    if (routing.groups, routing.layers) != (groups, config.model.moe_layers):
        raise ConfigError(
            f"--trace {path}: it has {model_shape(routing.groups, routing.layers)}, but {config.run.name} has "
            f"{model_shape(groups, config.model.moe_layers)}; give a trace of this model",
            see=GUIDE,
        )
    if routing.tokens is None:
        raise ConfigError(f"--trace {path}: the run has no trace of tokens; set monitor.trace, or use moe-dist trace")
    return routing


def print_replay(routing: Routing, ranked: Sequence[Estimate], rates: Rates) -> None:
    """Prints one line per EP size: the rows and bytes that the traced choices send under the placement of this EP size,
    and the step time of the best layout with this EP size."""
    tokens = routing.tokens
    assert tokens is not None
    table = Table(title=f"Replay of {routing.name}: {len(tokens.token_T):,} tokens", title_justify="left")
    table.caption = (
        f"Rows and bytes are measured: counted in the trace, forward and backward. Nodes of {rates.ranks_per_node} ranks; "
        f"once: as hierarchical sends them. Step: the best layout with this placement, {ranked[0].mark}."
    )
    heads = ("EP", "placement", "rows a token and layer", "bytes a token", "between nodes", "once", "dropped pairs")
    for head in (*heads, "busiest rank / mean", "s a step"):
        table.add_column(head, justify="left" if head == "placement" else "right")
    best = best_of_each(ranked, lambda each: each.placement.slots)
    for each in sorted(best, key=lambda e: e.config.parallel.ep):
        model, parallel = each.config.model, each.config.parallel
        choices, node = (tokens.ids_TLK, tokens.sequence_T, each.placement), rates.ranks_per_node
        starts = group_starts(parallel.ep, parallel.edp, node)
        counted = {at: traffic(*choices, (node,), micro_batch=each.config.train.micro_batch, first=at) for at in starts}
        found = next(iter(counted.values()))
        count = max(1, len(tokens.token_T))
        row_bytes = EXCHANGES[parallel.recompute] * model.hidden_dim * ITEMSIZE[parallel.precision] / count
        cells = [f"{found.rows / count / len(routing.layers):.3f}"]
        between = sum(groups * counted[at].between[node] for at, groups in starts.items()) / parallel.edp
        once = sum(groups * counted[at].between_hierarchical[node] for at, groups in starts.items()) / parallel.edp
        cells += [f"{number * row_bytes:,.0f}" for number in (found.rows, between, once)]
        dropped = int((tokens.ids_TLK < -1).sum())
        more = (f"{dropped:,}", f"{found.imbalance:.2f}", f"{each.seconds:.3g}")
        table.add_row(str(parallel.ep), each.config.placement.policy, *cells, *more)
    Console(width=None if Console().is_terminal else 200, highlight=False).print(table)


def solved_slots(load_LE: np.ndarray, ep: int) -> tuple[tuple[int, ...], ...]:
    """Returns the experts that the placement solver assigns to each rank. All ranks get the same number of experts."""
    slots_R = np.full(ep, -(-load_LE.shape[1] // ep))
    return slots_of(solve(load_LE, slots_R), ep)


def cost(each: Estimate, price: float | None) -> float:
    """Returns the value that the ranking minimises: GPU seconds per token with a price, else seconds per token."""
    return (each.gpus if price is not None else 1) / each.tokens_per_second


def shown_of(ranked: Sequence[Estimate], one: Sequence[Estimate]) -> list[Estimate]:
    """Returns the best layout of each number of GPUs. If there is only one number of GPUs, returns the first `SHOWN`
    layouts of `one`."""
    each_number = best_of_each(ranked, lambda each: each.gpus)
    return sorted(each_number, key=lambda each: each.gpus) if len(each_number) > 1 else list(one[:SHOWN])


def no_layout(config: Config, counts: Sequence[int], every: Sequence[Estimate], most: float) -> ConfigError:
    """Returns the error to raise if no layout can be ranked. Its message names the closest number of GPUs or the closest
    layout that would fit."""
    if not every:
        batch, least = config.train.global_batch, min(counts)
        near = max((n for n in range(1, batch + 1) if batch % n == 0 and n <= least), default=1)
        return ConfigError(
            f"--gpus {least}: train.global_batch={batch} must be a multiple of the number of GPUs; take --gpus {near}, or "
            f"train.global_batch={-(-batch // least) * least}",
            see=GUIDE,
        )
    nearest = min(every, key=lambda each: each.memory[2])
    return ConfigError(
        f"--memory {most / 1e9:g}: no layout of {len(every)} keeps the probability of running out below {LIKELY:g}; the "
        f"nearest needs {nearest.memory[2] / 1e9:.1f} GB on {nearest.gpus} GPUs: {nearest.name}; take more GPUs, or a card "
        "with more memory",
        see=GUIDE,
    )


# Columns of the table of layouts: head, and function that makes a cell.
COLUMNS: dict[str, Callable[[Estimate], str]] = {
    "GPUs": lambda each: str(each.gpus),
    "layout": lambda each: each.name,
    "s a step": lambda each: f"{each.seconds:.3g}",
    "tokens/s": lambda each: f"{each.tokens_per_second:,.0f}",
    "exchange": lambda each: f"{each.exchange / each.seconds:.0%}",
    "GB inside": lambda each: f"{each.bytes_inside / 1e9:,.0f}",
    "GB between": lambda each: f"{each.bytes_between / 1e9:,.0f}",
    "GB of memory, 50 %, 99 %": lambda each: f"{each.memory[0] / 1e9:.1f}, {each.memory[2] / 1e9:.1f}",
    "P(full)": lambda each: f"{each.out_of_memory:.2g}",
}
WIDE_ONLY = ("GB inside", "GB between", "P(full)")
WIDE = 120  # terminal width from which on all table columns fit


def print_plan(ranked: Sequence[Estimate], best: Estimate, count: int, rates: Rates, options: PlanOptions) -> None:
    """Prints the best layouts, and the sources of the figures. For a range of GPUs, prints the best layout of each number
    of GPUs."""
    where = "the trace" if options.trace is not None else "expectations of the configuration under uniform routing"
    table = Table(
        title=f"{best.config.run.name}: {count} layouts, {len(ranked)} fit", title_justify="left", caption_justify="left"
    )
    table.caption = (
        f"Time: {best.mark}, by rates of {rates.card} ({rates.machine}: {rates.source}). Rows, bytes and memory: "
        f"{best.rows_mark}, from {where}. Exchange: share of the step that no compute covers. P(full): probability that a "
        "step runs out of memory."
    )
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    columns, widest = dict(COLUMNS), None
    if console.width < WIDE:
        widest = len("GB of memory,")  # the head wraps at this width; the column of layouts gets the remaining width
        columns = {head: cell for head, cell in columns.items() if head not in WIDE_ONLY}
        table.caption += f" A terminal of {WIDE} columns also shows {', '.join(WIDE_ONLY)}."
    if options.price is not None:
        price = options.price * 1e9 / 3600
        columns["price of 1e9 tokens"] = lambda each: f"{price * each.gpus / each.tokens_per_second:,.2f}"
    for head in columns:
        if head == "layout":
            table.add_column(head)
        else:
            table.add_column(head, justify="right", max_width=widest)
    for each in shown_of(ranked, ranked):
        table.add_row(*(cell(each) for cell in columns.values()), style="bold" if each is best else None)
    console.print(table)


if __name__ == "__main__":
    run_command(main)
