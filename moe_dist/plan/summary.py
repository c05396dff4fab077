"""Describes a run in a few lines: model, ranks, data, and the commands that show its progress. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_dist.placement.placement import ExpertGroup, group_shares
from moe_dist.plan import flops
from moe_dist.plan.preflight import PlannedLayout


def start_text(layout: PlannedLayout, path: str, root: str) -> str:
    """Returns the text printed at the start of a run in the folder `path`: model, ranks, data, and commands."""
    config = layout.config
    model, train, data = config.model, config.train, config.data
    experts = per_token(layout.groups, layout.token_mix)
    parameters, active = flops.parameters(model).total, flops.active_parameters(model, **experts).total
    groups = "; ".join(f"{group.name}: top {group.top_k} of {_kinds(group)}" for group in layout.groups)
    tokens = sum(layout.token_mix.values())
    shares = ", ".join(f"{name} {count / tokens:.0%}" for name, count in layout.token_mix.items() if tokens)
    batch = f"{train.steps} steps of {train.global_batch} x {data.seq_len} tokens"
    return (
        f"Model: {count_text(parameters).strip()} parameters, of which a token uses {count_text(active).strip()}; "
        f"{model.num_layers} layers, {len(model.moe_layers)} with experts\n"
        f"Experts: {groups}\n"
        f"Ranks: {config.parallel.ep * config.parallel.edp} (engine {config.engine.kind}: ep {config.parallel.ep} x edp "
        f"{config.parallel.edp}{config.engine.degrees_text()})\n"
        f"Data: {data.path}{f' ({shares})' if shares else ''}; {batch}\n"
        f"Follow it: moe-dist status {path}\n"
        f"Charts: tensorboard --logdir {root}, then http://localhost:6006/#custom_scalars\n"
    )


def _kinds(group: ExpertGroup) -> str:
    """Returns the number of experts of each kind, such as '8 + 24 null'."""
    free = group.num_identity + group.num_constant
    null = group.num_columns - group.num_experts - free
    counts = ((group.num_experts, ""), (null, " null"), (free, " identity or constant"))
    return " + ".join(f"{count}{kind}" for count, kind in counts if count)


def per_token(groups: Sequence[ExpertGroup], token_mix: Mapping[str, int]) -> dict[str, Any]:
    """Returns arguments for `moe_dist.plan.flops`: each group's mean number of true experts per token, and token share."""
    names = [group.name for group in groups]
    shares = dict(zip(names, group_shares(groups, token_mix), strict=True))
    return {"experts_per_token": flops.expected_experts(groups), "token_share": shares}


def count_text(number: float) -> str:
    """Returns a number with three digits as text, followed by a space and, from 1000 on, by the unit K, M, G, T, P or E."""
    number = float(f"{number:.3g}")  # rounded before the unit is chosen, so that 999.9 becomes 1 K
    if number < 1000:
        return f"{number:.3g} "
    power = min(6, int(math.log10(number) + 1e-12) // 3)
    return f"{number / 1000**power:.3g} {'KMGTPE'[power - 1]}"


def bytes_text(number: float) -> str:
    """Returns a number of bytes as text in B, KiB, MiB, GiB, TiB or PiB."""
    power = min(5, int(math.log2(number)) // 10) if number >= 1 else 0
    units = number / 1024**power
    return f"{units:.{3 if units < 999.5 else 4}g} {['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'][power]}"
