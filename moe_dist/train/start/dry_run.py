"""Estimates the parameters, FLOPs, memory, checkpoint size, tokens and hours of a run, without a GPU and without data.

The model is built on the meta device to check the computed number of parameters. FLOPs, memory and traffic are expected
values for a router that chooses each expert of a group with equal probability, including null experts.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moe_dist.config.schema import Config
from moe_dist.placement.parameter_names import EXPERTS, named_parameters
from moe_dist.placement.placement import ExpertGroup
from moe_dist.plan import flops, memory
from moe_dist.plan.planner import PlacementCosts, fullest_rank
from moe_dist.plan.preflight import PlannedLayout, layout_without_data
from moe_dist.plan.summary import bytes_text, count_text, per_token
from moe_dist.train.build.training import build_model


@dataclass(frozen=True)
class DryRun:
    """The estimates for one run."""

    layout: PlannedLayout  # placement of the experts, and each modality's fraction of the tokens
    world_size: int
    parts: flops.Parts  # number of parameters of each part of the model
    active_parameters: float  # mean number of parameters with which a token is computed
    forward: flops.Parts  # FLOPs per token by part of the model
    training_flops: tuple[float, float]  # FLOPs per token of forward and backward, without and with recomputation
    plan: PlacementCosts  # expected expert FLOPs and traffic of each rank
    rank: int  # the EP rank that needs the most memory
    rank_memory: memory.RankMemory  # memory of the EP rank `rank`
    exchange_bytes: float  # bytes per token that all layers together send in forward, backward and recomputation
    checkpoint_bytes: float
    tokens: int  # number of tokens of the whole run, including padding


def dry_run(config: Config, *, tokens_per_second: float | None = None, console: Console | None = None) -> DryRun:
    """Prints the estimates for a run and returns them. Raises ConfigError or DataError if the run is not possible. The
    error message lists every problem that can be found without the data. The run's hours are computed from
    `tokens_per_second`, the throughput of all ranks together; with None no hours are printed."""
    result = estimate(config)
    console = console or Console()
    console.print(render(config, result, tokens_per_second))
    for note in _notes(result):
        console.print(note, highlight=False)
    return result


def estimate(config: Config) -> DryRun:
    """Computes the estimates for a run. Raises the same errors as `dry_run`."""
    layout = layout_without_data(config)
    model, parallel = config.model, config.parallel
    parts = flops.parameters(model)
    if not config.engine.hosts:  # otherwise `parts` are only estimates
        _agree_with_model(config, layout, parts)
    experts = per_token(layout.groups, layout.token_mix)
    forward = flops.forward_flops(model, seq_len=config.data.seq_len, **experts)
    rank, rank_memory, plan = fullest_rank(config, layout.placement, layout.token_mix)
    frozen = flops.flops_left_out(config, forward)
    useful = flops.training_flops(forward, frozen=frozen)
    exchanges = 5 if parallel.recompute == "block" else 4  # recompute=block repeats the dispatch of the forward pass
    return DryRun(
        layout=layout,
        world_size=parallel.ep * parallel.edp,
        parts=parts,
        active_parameters=flops.active_parameters(model, **experts).total,
        forward=forward,
        training_flops=(useful, flops.training_flops(forward, recompute=parallel.recompute, frozen=frozen)),
        plan=plan,
        rank=rank,
        rank_memory=rank_memory,
        exchange_bytes=exchanges
        * plan.remote_rows_per_token
        * (len(model.moe_layers) - flops.layers_passed_by(model))
        * (model.hidden_dim * memory.ITEMSIZE[parallel.precision]),
        checkpoint_bytes=memory.checkpoint_bytes(config),
        tokens=config.train.steps * config.train.global_batch * config.data.seq_len,
    )


def render(config: Config, result: DryRun, tokens_per_second: float | None = None) -> Table:
    """Returns the estimates as a table."""
    table = Table(
        title=f"{config.run.name}: {result.world_size} ranks (ep {config.parallel.ep} x edp {config.parallel.edp}"
        f"{config.engine.degrees_text()})"
    )
    for column in ("what", "how much", "of which"):
        table.add_column(column, justify="right" if column == "how much" else "left")
    table.add_row("parameters", count_text(result.parts.total), _parts_text(result.parts))
    table.add_row("active parameters", count_text(result.active_parameters), _experts_text(result))
    useful, computed = result.training_flops
    table.add_row("FLOPs a token, forward", count_text(result.forward.total), _parts_text(result.forward))
    repeats = f"; {count_text(computed)} with recompute={config.parallel.recompute}" if computed > useful else ""
    table.add_row("FLOPs a token, training", count_text(useful), f"{_times(config)}{repeats}")
    table.add_section()
    _add_memory_rows(table, config, result)
    what = "adapters and routers alone, " if config.model.has_adapters else ""
    whose = " of the tuned routers" if config.router_tuning else ""
    kept = f"all ranks together, {what}weights in fp32, moments{whose} in fp32"
    table.add_row("checkpoint", bytes_text(result.checkpoint_bytes), kept)
    table.add_section()
    rows = f"{result.plan.remote_rows_per_token:.3f} remote rows a token and layer; placement {config.placement.policy}"
    table.add_row("exchanged a token", bytes_text(result.exchange_bytes), rows)
    table.add_row(
        "balance", f"{result.plan.efficiency:.0%}", "mean over busiest rank's expert work, by the placement alone"
    )
    table.add_section()
    train = config.train
    batch = f"{train.steps} steps x {train.global_batch} sequences x {config.data.seq_len} tokens"
    table.add_row("tokens", count_text(result.tokens), batch)
    if tokens_per_second:
        hours = result.tokens / tokens_per_second / 3600
        rate = tokens_per_second * useful / result.world_size
        table.add_row(
            "hours",
            f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}",
            f"at {tokens_per_second:,.0f} tokens/s: {count_text(rate)}FLOP/s a rank",
        )
    return table


def _times(config: Config) -> str:
    if config.router_tuning is not None:
        return "forward, and back to the lowest tuned layer"
    return "three times forward" + (", without gradients of frozen weights" if config.model.has_adapters else "")


def _agree_with_model(config: Config, layout: PlannedLayout, parts: flops.Parts) -> None:
    """Checks that the sum of `parts` equals the number of parameters of the run's model, counted over all EP ranks."""
    placement, total = layout.placement, 0
    held_R = [tuple(len(placement.local_experts(rank, g)) for g in layout.groups) for rank in range(placement.num_ranks)]
    for held, ranks in Counter(held_R).items():  # ranks with the same numbers of experts have equal models
        with torch.device("meta"):
            model = build_model(config, placement, ep_rank=held_R.index(held), ep_group=None)
        experts = _numel([each.parameter for each in named_parameters(model) if each.role in EXPERTS])
        total += ranks * experts + (0 if total else _numel(list(model.parameters())) - experts)
    if total != parts.total:
        raise AssertionError(f"the model has {total} parameters, the count by parts says {parts.total}")


def _numel(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _add_memory_rows(table: Table, config: Config, result: DryRun) -> None:
    needs, parallel = result.rank_memory, config.parallel
    sharded = "sharded by FSDP2" if parallel.data == "fsdp2" else config.engine.dense_text
    moments = "two moments, one of matrices" if config.optimizer.orthogonal else "two moments"
    table.add_row("memory a rank", bytes_text(needs.total), f"the fullest: EP position {result.rank}; an estimate")
    table.add_row("  parameters", bytes_text(needs.parameters), f"fp32 master weights, {sharded}")
    later = f"; {bytes_text(needs.in_turn)} of them only after activations are freed" if needs.in_turn else ""
    table.add_row("  gradients", bytes_text(needs.gradients), f"fp32{later}")
    table.add_row("  optimizer state", bytes_text(needs.optimizer), f"{moments}, fp32")
    table.add_row("  weights in use", bytes_text(needs.casts), f"{parallel.precision}, while a micro-batch is computed")
    batch = f"{config.train.micro_batch} x {config.data.seq_len} tokens, recompute={parallel.recompute}"
    table.add_row("  activations", bytes_text(needs.activations), f"{batch}; formula in moe_dist/plan/memory.py")
    bound = "send and receive buffers of one layer if every token goes to one rank: the bound"
    table.add_row("exchange buffers", bytes_text(needs.exchange_bound), bound)


def _parts_text(parts: flops.Parts) -> str:
    named = {name.replace("_", " "): value for name, value in vars(parts).items() if value}
    return ", ".join(f"{name} {count_text(value).strip()}" for name, value in named.items())


def _experts_text(result: DryRun) -> str:
    groups = result.layout.groups
    return "; ".join(
        f"{g.name}: {g.expected_experts_per_token:.3g} of {g.num_experts} experts{_others_text(g)}" for g in groups
    )


def _others_text(group: ExpertGroup) -> str:
    """Returns a text with a group's top_k and its numbers of null, identity and constant experts; empty if it has none."""
    counts = {"null": group.num_null, "identity": group.num_identity, "constant": group.num_constant}
    named = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f" (top {group.top_k} with {named})" if named else ""


def _notes(result: DryRun) -> list[str]:
    if result.layout.token_mix:
        mix = result.layout.token_mix
        shares = ", ".join(f"{name} {count / sum(mix.values()):.0%}" for name, count in mix.items())
        return [f"Token mix of the data: {shares}."]
    modalities = [modality for group in result.layout.groups for modality in group.modalities]
    return [f"The data are not there: tokens taken to be spread evenly over {', '.join(modalities)}."]
