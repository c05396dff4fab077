"""Makes the record of a step from the step's result. All functions in this file are pure.

Shape letters: M modalities, G groups, W ranks of the world.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_dist.config.base.section import RESERVED_MODALITIES
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.monitor.metrics import (
    NEEDED,
    Record,
    comm_scalars,
    depth_scalars,
    divide,
    group_metrics,
    ratio,
    reduce_known,
    routing_arrays,
    routing_scalars,
    slowest_rank,
)
from moe_dist.monitor.statistics import LeverDecision, WeightTable
from moe_dist.monitor.tags import DEPTH_FAMILY, tag_plan
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.build.training import LoopSettings
from moe_dist.train.start.resume import Progress
from moe_dist.train.step.result import StepResult


def build_record(
    result: StepResult,
    plan: LoopSettings,
    progress: Progress,
    *,
    seconds: float,
    epochs: Mapping[str, float],
    readings: Mapping[str, float | None] | None = None,
    levers: Sequence[LeverDecision] = (),
    weights: WeightTable | None = None,
    problems: Sequence[tuple[str, str]] = (),
    read_seconds: float | None = None,
    sources: Sequence[str] = (),
) -> Record:
    """Builds the record of a step. Raises ValueError if a modality has the name of a loss term.

    Args:
        epochs: Number of passes over the training data so far, by modality.
        readings: Latest readings of `devices.DeviceMonitor`. Readings whose names begin with device/ become scalars, all
            others become part of `Record.host`.
        levers: Decisions that the levers of `rank_balance` made after this step.
        weights: Weights and updates of this step, if they were measured.
        problems: `Record.problems`.
        read_seconds: Seconds that rank 0 waited for the step's batches; an entry of `Record.host`.
        sources: Names of the sources of the data.
    """
    counts, depths, placement, modalities = result.counts, result.mixture_of_depths, plan.placement, plan.modalities
    tags = tag_plan(len(placement.groups), len(modalities), mixture_of_depths=depths is not None)
    readings, memory, step = readings or {}, memory_of_ranks(result.memory_W3), progress.step - 1  # counted from 0
    labels = dict(zip(modalities, result.labels_M.tolist(), strict=True))
    losses = {name: ratio(nll, labels[name]) for name, nll in zip(modalities, result.nll_M.tolist(), strict=True)}
    epochs = {name: float(epochs.get(name, 0.0)) for name in modalities}
    arrays = routing_arrays(counts, placement)
    scalars = {
        **loss_scalars(result, losses, split=tags.loss_per_modality),
        "optim/lr": plan.lr(step),
        "optim/grad_norm": result.grad_norm,
        "optim/skipped_steps": float(progress.skipped_steps),
        "optim/tokens": float(progress.tokens),
        **routing_scalars(counts, arrays, placement, tags),
        **comm_scalars(result.ledger, result.comm_seconds),
        **perf_scalars(result, plan, seconds),
        "device/utilisation": readings.get("device/utilisation"),
        "device/memory": memory.get("largest_reserved_mib"),
        "device/power": readings.get("device/power"),
    }
    if tags.epochs_per_modality:
        scalars |= {f"data/epochs/{name}": value for name, value in epochs.items()}
    else:
        scalars["data/epochs/max"] = max(epochs.values(), default=0.0)
    if depths is not None:
        scalars |= depth_scalars(depths, split=DEPTH_FAMILY in tags.by_group)
    updates = step - (progress.skipped_steps - result.skipped)  # number of updates before this step
    target = {name: target_at(updates) for name, target_at in plan.active_target.items()}
    peak, source = plan.peak_flops, plan.peak_source
    return Record(
        step=progress.step,
        skipped=result.skipped,
        scalars=scalars,
        losses=losses,
        labels=labels,
        epochs=epochs,
        balance_coefficient=plan.aux(step).balance,
        arrays=arrays,
        ledger=dict(result.ledger),
        host={
            **{name: value for name, value in readings.items() if not name.startswith("device/")},
            **slowest_rank(result.busy_seconds_W),
            **memory,
            **({} if read_seconds is None else {"read_seconds": read_seconds}),
            **needed_factors(result.busiest_G, placement.groups),
            **({} if peak is None else {"mfu_peak": f"{peak / 1e12:g} TFLOP/s of all ranks ({source})"}),
        },
        busy_seconds_W=result.busy_seconds_W,
        memory_W3=result.memory_W3,
        data_D2=data_of_ranks(result.data_D3),
        loss_scale_D=divide(result.total_D, result.data_D3[:, 1]),
        words_DK=result.words_DK,
        source_losses=losses_of_sources(result.sources_S2, sources),
        load=active_against_target(counts.choices_LC, counts.tokens_LG, placement.groups, target),
        target_G=np.array([target.get(group.name, np.nan) for group in placement.groups], np.float64),
        mixture_of_depths=depths,
        levers=levers,
        weights=weights,
        problems=problems,
    )


def active_against_target(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], target: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Computes `Record.load` for the groups that have an entry in `target`."""
    chosen_LG = group_metrics(choices_LC, tokens_LG, groups)["experts_per_token"]
    return {
        group.name: {
            "target": target[group.name],
            "achieved": reduce_known(chosen_L),
            "lowest": reduce_known(chosen_L, np.min),
            "highest": reduce_known(chosen_L, np.max),
        }
        for group, chosen_L in zip(groups, chosen_LG.T, strict=True)
        if group.name in target
    }


def memory_of_ranks(memory_W3: np.ndarray) -> dict[str, float]:
    """Returns the largest value of each column of `Record.memory_W3`, the largest difference between reserved and allocated
    MiB, and the rank that has each of these values. Returns nothing in the first step."""
    if not memory_W3.size:
        return {}
    allocated_W, reserved_W, retries_W = memory_W3.T
    by_name = {"allocated_mib": allocated_W, "reserved_mib": reserved_W, "allocator_retries": retries_W}
    by_name["unused_mib"] = reserved_W - allocated_W
    largest = {f"largest_{name}": float(value_W.max()) for name, value_W in by_name.items()}
    return largest | {f"largest_{name}_rank": int(value_W.argmax()) for name, value_W in by_name.items()}


def data_of_ranks(data_D3: np.ndarray) -> np.ndarray:
    """Returns `Record.data_D2` from `StepResult.data_D3`."""
    return np.stack([data_D3[:, 0], divide(data_D3[:, 1], data_D3[:, 2])], axis=1)


def losses_of_sources(sources_S2: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Returns `Record.source_losses` from `StepResult.sources_S2`."""
    pairs = zip(names, sources_S2.tolist(), strict=False)  # empty in the first step
    return {name: nats / labels for name, (nats, labels) in pairs if labels}


def needed_factors(busiest_G: np.ndarray, groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """Returns the known values of `busiest_G` as entries of `Record.host`, without groups whose experts choose tokens."""
    pairs = zip(groups, busiest_G.tolist(), strict=False)  # `busiest_G` is empty in the first step
    return {f"{NEEDED}{group.name}": most for group, most in pairs if most and group.token_share is None}


def loss_scalars(result: StepResult, losses: Mapping[str, float | None], *, split: bool) -> dict[str, float | None]:
    """Returns each term of the loss, and their sum loss/total = nats / labels (of all modalities) + balance + z +
    auxiliary. Raises ValueError if a modality has the name of a loss term."""
    taken = sorted(set(losses if split else ()) & set(RESERVED_MODALITIES))
    if taken:
        raise ValueError(f"modalities: {taken} are names of loss terms; rename them in the manifest")
    nats = ratio(sum(result.nll_M.tolist()), sum(result.labels_M.tolist()))
    total = None if nats is None else nats + result.balance + result.z + result.auxiliary
    # Runs with auxiliary routers or router tuning have no z-loss. There loss/auxiliary replaces loss/z, so that a step has
    # at most 40 scalars.
    third = {"loss/auxiliary": result.auxiliary} if result.auxiliary else {"loss/z": result.z}
    by_modality = {f"loss/{name}": value for name, value in losses.items()} if split else {}
    return {"loss/total": total, **by_modality, "loss/balance": result.balance, **third}


def perf_scalars(result: StepResult, plan: LoopSettings, seconds: float) -> dict[str, float | None]:
    """Returns the throughput, and mfu = FLOPs per token x tokens per second / peak FLOPs per second of all devices
    (Chowdhery et al. 2022, appendix B). mfu is None if the peak is unknown."""
    rate, mfu = ratio(result.tokens, seconds), None
    if rate and plan.peak_flops:
        mfu = rate * flops_per_token(result.counts, plan) / plan.peak_flops
    return {"perf/tokens_per_second": rate, "perf/step_seconds": seconds, "perf/mfu": mfu}


def flops_per_token(counts: RoutingCounts[np.ndarray], plan: LoopSettings) -> float:
    """Returns a step's FLOPs per token, from each group's true experts per token and its fraction of the tokens."""
    placement, tokens_G = plan.placement, counts.tokens_LG.sum(0)
    taken_E = (counts.choices_LC[:, : placement.num_experts] - counts.dropped_LE).sum(0)
    experts, share = {}, {}
    for group, tokens in zip(placement.groups, tokens_G, strict=True):
        experts[group.name] = float(taken_E[group.experts].sum() / max(1, tokens))
        share[group.name] = float(tokens / max(1, tokens_G.sum()))
    return plan.flops_per_token(experts, share)
