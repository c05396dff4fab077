"""Makes the record of a step from the step's result. All functions are pure.

Shape letters: M modalities, G groups, W ranks of the world.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_dist.config.base.section import RESERVED_MODALITIES
from moe_dist.monitor.metrics import (
    NEEDED,
    Record,
    depth_scalars,
    group_metrics,
    ratio,
    reduce_known,
    routing_arrays,
    routing_scalars,
    slowest_rank,
)
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.monitor.tags import DEPTH_FAMILY, tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.train.step.result import StepResult


@dataclass(frozen=True)
class LoopValues:
    """Values of a step that only the training loop knows.

    Attributes:
        step: Number of the step; the first step of a run is 1.
        balance_coefficient: Coefficient of the balance loss in this step.
        lr: Learning rate of this step.
        skipped_steps: Skipped steps of the run so far.
        tokens: Input tokens of the run so far, without padding.
        seconds: Wall time of the step.
        epochs: Number of passes over the training data of each modality so far.
        flops_per_token: Forward and backward FLOPs per token, for the measured experts per token; None if unknown.
        active_target: True experts per token that a load controller aims at in this step, by group.
        levers: Decisions of the levers of `rank_balance` after this step.
    """

    step: int
    balance_coefficient: float
    lr: float
    skipped_steps: int
    tokens: int
    seconds: float
    epochs: Mapping[str, float] = field(default_factory=dict)
    flops_per_token: float | None = None
    active_target: Mapping[str, float] = field(default_factory=dict)
    levers: Sequence[LeverDecision] = ()


def build_record(
    result: StepResult,
    loop: LoopValues,
    *,
    placement: ExpertPlacement,
    modalities: Sequence[str],
    readings: Mapping[str, float | None] | None = None,
    peak_flops: float | None = None,
    peak_source: str = "monitor.peak_tflops",
) -> Record:
    """Builds the record of a step.

    Args:
        modalities: All modalities of the data, in the manifest's order.
        readings: Latest readings of `devices.DeviceMonitor`. Names that begin with device/ become scalars; all other
            readings go to `Record.host`.
        peak_flops: Peak FLOPs per second of all devices together; without `peak_flops` perf/mfu is None.
        peak_source: The card or configuration key from which `peak_flops` comes.

    Raises:
        ValueError: A modality has the name of a loss term.
    """
    groups, counts, depths = placement.groups, result.counts, result.mixture_of_depths
    plan = tag_plan(len(groups), len(modalities), mixture_of_depths=depths is not None)
    readings, memory = readings or {}, memory_of_ranks(result.memory_W3)
    labels = dict(zip(modalities, result.labels_M.tolist(), strict=True))
    losses = {name: ratio(nll, labels[name]) for name, nll in zip(modalities, result.nll_M.tolist(), strict=True)}
    epochs = {name: float(loop.epochs.get(name, 0.0)) for name in modalities}
    arrays = routing_arrays(counts, placement)
    scalars = {
        **loss_scalars(result, losses, split=plan.loss_per_modality),
        "optim/lr": loop.lr,
        "optim/grad_norm": result.grad_norm,
        "optim/skipped_steps": float(loop.skipped_steps),
        "optim/tokens": float(loop.tokens),
        **routing_scalars(counts, arrays, placement, plan),
        **comm_scalars(result.ledger, result.comm_seconds),
        **perf_scalars(result, loop, peak_flops),
        "device/utilisation": readings.get("device/utilisation"),
        "device/memory": memory.get("largest_reserved_mib"),
        "device/power": readings.get("device/power"),
    }
    if plan.epochs_per_modality:
        scalars |= {f"data/epochs/{name}": value for name, value in epochs.items()}
    else:
        scalars["data/epochs/max"] = max(epochs.values(), default=0.0)
    if depths is not None:
        scalars |= depth_scalars(depths, split=DEPTH_FAMILY in plan.by_group)
    return Record(
        step=loop.step,
        skipped=result.skipped,
        scalars=scalars,
        losses=losses,
        labels=labels,
        epochs=epochs,
        balance_coefficient=loop.balance_coefficient,
        arrays=arrays,
        ledger=dict(result.ledger),
        host={
            **{name: value for name, value in readings.items() if not name.startswith("device/")},
            **slowest_rank(result.busy_seconds_W),
            **memory,
            **needed_factors(result.busiest_G, groups),
            **({} if peak_flops is None else {"mfu_peak": f"{peak_flops / 1e12:g} TFLOP/s of all ranks ({peak_source})"}),
        },
        busy_seconds_W=result.busy_seconds_W,
        memory_W3=result.memory_W3,
        load=active_against_target(counts.choices_LC, counts.tokens_LG, groups, loop.active_target),
        target_G=np.array([loop.active_target.get(group.name, np.nan) for group in groups], np.float64),
        mixture_of_depths=depths,
        levers=loop.levers,
    )


def active_against_target(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], target: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """Computes `Record.load` for the groups that `target` names."""
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
    """Returns the largest value of each column of `Record.memory_W3`, the largest difference of reserved and allocated MiB,
    and for each maximum its rank. Empty in the first step."""
    if not memory_W3.size:
        return {}
    allocated_W, reserved_W, retries_W = memory_W3.T
    by_name = {"allocated_mib": allocated_W, "reserved_mib": reserved_W, "allocator_retries": retries_W}
    by_name["unused_mib"] = reserved_W - allocated_W
    largest = {f"largest_{name}": float(value_W.max()) for name, value_W in by_name.items()}
    return largest | {f"largest_{name}_rank": int(value_W.argmax()) for name, value_W in by_name.items()}


def needed_factors(busiest_G: np.ndarray, groups: Sequence[ExpertGroup]) -> dict[str, float]:
    """The entries of `Record.host` with `busiest_G` by group; none where it is unknown, or experts choose tokens."""
    pairs = zip(groups, busiest_G.tolist(), strict=False)  # empty in the first step
    return {f"{NEEDED}{group.name}": most for group, most in pairs if most and group.capacity is None}


def loss_scalars(result: StepResult, losses: Mapping[str, float | None], *, split: bool) -> dict[str, float | None]:
    """Returns each term of the loss, and loss/total = nats / labels (of all modalities) + balance + z + auxiliary.

    Raises:
        ValueError: A modality has the name of a loss term.
    """
    taken = sorted(set(losses if split else ()) & set(RESERVED_MODALITIES))
    if taken:
        raise ValueError(f"modalities: {taken} are names of loss terms; rename them in the manifest")
    nats = ratio(sum(result.nll_M.tolist()), sum(result.labels_M.tolist()))
    total = None if nats is None else nats + result.balance + result.z + result.auxiliary
    # Runs with auxiliary routers or router tuning have no z-loss, so that loss/auxiliary can replace loss/z in the 40
    # scalars.
    third = {"loss/auxiliary": result.auxiliary} if result.auxiliary else {"loss/z": result.z}
    by_modality = {f"loss/{name}": value for name, value in losses.items()} if split else {}
    return {"loss/total": total, **by_modality, "loss/balance": result.balance, **third}


def comm_scalars(ledger: Mapping[str, int], seconds: float) -> dict[str, float | None]:
    """Returns the scalars of the step's communication, without metadata bytes.

    The bytes of other dispatch methods are estimated as the methods' rows times this step's bytes per row (padding rows
    included).
    """
    ours = ledger["rows_remote"] + ledger.get("rows_padding", 0)
    row_bytes = ratio(ledger["payload_bytes"], ours)  # forward, backward and recomputation

    def saved(rows: int) -> float | None:
        if row_bytes is None:  # without sent rows the bytes per row are unknown
            return None if rows else 0.0
        return (rows - ours) * row_bytes

    return {
        "comm/bytes_sent": float(ledger["payload_bytes"]),
        "comm/bytes_saved_vs_topk": saved(ledger["rows_topk"]),
        "comm/bytes_saved_vs_same_active": saved(ledger["rows_same_active"]),
        "comm/dedup_factor": ratio(ledger["rows_per_pair"], ours),
        "comm/seconds": seconds,
    }


def perf_scalars(result: StepResult, loop: LoopValues, peak_flops: float | None) -> dict[str, float | None]:
    """Returns throughput. mfu = FLOPs per token x tokens per second / `peak_flops` (Chowdhery et al. 2022, appendix B)."""
    rate = ratio(result.tokens, loop.seconds)
    mfu = rate * loop.flops_per_token / peak_flops if rate and loop.flops_per_token and peak_flops else None
    return {"perf/tokens_per_second": rate, "perf/step_seconds": loop.seconds, "perf/mfu": mfu}
