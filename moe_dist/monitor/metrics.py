"""Computes the record of a step from the step's global statistics. All functions are pure.

Shape letters: L MoE layers, G groups, C choice columns (all true experts by logical id, then null, identity and constant
experts), E true experts of all groups, n true experts of one group, R ranks of an EP group, W ranks of the world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_dist.config.base.section import RESERVED_MODALITIES
from moe_dist.monitor.statistics import DepthStatistics, LeverDecision, StepResult, StepStatistics
from moe_dist.monitor.tags import DEPTH_FAMILY, GROUP_FAMILIES, tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

NEEDED = "needed_capacity_factor/"  # key of `Record.host`, with the name of a group: this factor would have dropped nothing


@dataclass(frozen=True)
class Record:
    """The data of one step that sinks show and store.

    Attributes:
        step: Number of the step; the first step of a run is 1.
        skipped: True if no rank took the optimizer step.
        scalars: Number by tag (`tags.MEANING`); None if the step lacks the number. nan and inf are computed numbers.
        losses: Nats per token by modality. The loss is None if the step had no label of the modality.
        labels: Number of unmasked labels by modality.
        epochs: Number of passes over each modality's training data so far.
        balance_coefficient: Coefficient of the balance loss.
        arrays: int64 counts choices_LC, tokens_LG, rows_LR and dropped_LG; float64 entropy_LG (nats per token) and
            weighted_rows_LR (computed pairs x FFN width). Expert choice adds above_LE (tokens above the threshold) and
            idle_LG (tokens without an expert).
        ledger: Counts of bytes and rows in dispatch and combine (`StepResult.ledger`).
        host: CPU and memory readings of rank 0's machine, seconds of work of the slowest rank and of the other ranks, the
            largest memory of any rank, the peak rate by which perf/mfu divides, and `StepResult.busiest_G` by group.
        busy_seconds_W: Seconds that each rank worked in the previous step, without waits; empty in the first step.
        memory_W3: MiB allocated, MiB reserved and retries of each rank's allocator (`train.step.largest_memory`); empty in
            the first step.
        load: For each group with a load controller, true experts per token: the step's `target`, the mean over layers
            (`achieved`), and the `lowest` and `highest` layer's number, all before a capacity drops pairs. A number is None
            if the group had no tokens.
        target_G: float64, the targets in `load`; nan for a group without one.
        mixture_of_depths: Sums of the mixture-of-depths layers; None without such layers.
        levers: Decisions of the levers of `rank_balance` after this step.
    """

    step: int
    skipped: bool
    scalars: Mapping[str, float | None]
    losses: Mapping[str, float | None]
    labels: Mapping[str, int]
    epochs: Mapping[str, float]
    balance_coefficient: float
    arrays: Mapping[str, np.ndarray]
    ledger: Mapping[str, int]
    host: Mapping[str, float | str | None] = field(default_factory=dict)
    busy_seconds_W: np.ndarray = field(default_factory=lambda: np.zeros(0))
    memory_W3: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))
    load: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    target_G: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mixture_of_depths: DepthStatistics | None = None
    levers: Sequence[LeverDecision] = ()


def build_record(
    stats: StepStatistics,
    *,
    groups: Sequence[ExpertGroup],
    placement: ExpertPlacement,
    modalities: Sequence[str],
    readings: Mapping[str, float | None] | None = None,
    peak_flops: float | None = None,
    peak_source: str = "monitor.peak_tflops",
) -> Record:
    """Builds the record of a step.

    Args:
        groups: Groups in the order of the columns G.
        modalities: All modalities of the data, in the manifest's order.
        readings: Latest readings of `devices.DeviceMonitor`. Names that begin with device/ become scalars; all other
            readings go to `Record.host`.
        peak_flops: Peak FLOPs per second of all devices together; without `peak_flops` perf/mfu is None.
        peak_source: The card or configuration key from which `peak_flops` comes.

    Raises:
        ValueError: A modality has the name of a loss term.
    """
    result, counts = stats.result, stats.result.counts
    depths = result.mixture_of_depths
    plan = tag_plan(len(groups), len(modalities), mixture_of_depths=depths is not None)
    readings, memory = readings or {}, memory_of_ranks(result.memory_W3)
    labels = dict(zip(modalities, result.labels_M.tolist(), strict=True))
    losses = {name: ratio(nll, labels[name]) for name, nll in zip(modalities, result.nll_M.tolist(), strict=True)}
    epochs = {name: float(stats.epochs.get(name, 0.0)) for name in modalities}
    choices_LE = counts.choices_LC[:, : placement.num_experts]
    rows_LR = rows_by_rank(choices_LE - counts.dropped_LE, placement)
    weighted_LR = weighted_rows(counts.choices_LC, rows_LR, placement)
    dropped_LG = np.stack([counts.dropped_LE[:, group.experts].sum(1) for group in groups], axis=1)
    scalars = {
        **loss_scalars(result, losses, split=plan.loss_per_modality),
        "optim/lr": stats.lr,
        "optim/grad_norm": result.grad_norm,
        "optim/skipped_steps": float(stats.skipped_steps),
        "optim/tokens": float(stats.tokens),
        **group_scalars(counts.choices_LC, counts.tokens_LG, groups, split=plan.by_group, dropped_LG=dropped_LG),
        "moe/rank_imbalance": reduce_known(busiest_over_mean(weighted_LR)),
        "moe/dropped": float(dropped_LG.sum()),
        "moe/dead_experts": float((choices_LE == 0).sum()),
        "moe/router_entropy": ratio(counts.entropy_LG.sum(), counts.tokens_LG.sum()),
        **comm_scalars(result.ledger, result.comm_seconds),
        **perf_scalars(stats, peak_flops),
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
        step=stats.step,
        skipped=result.skipped,
        scalars=scalars,
        losses=losses,
        labels=labels,
        epochs=epochs,
        balance_coefficient=stats.balance_coefficient,
        arrays={
            "choices_LC": counts.choices_LC,
            "tokens_LG": counts.tokens_LG,
            "rows_LR": rows_LR,
            "dropped_LG": dropped_LG,
            "entropy_LG": divide(counts.entropy_LG, counts.tokens_LG),  # mean over tokens
            "weighted_rows_LR": weighted_LR,
            **({"above_LE": counts.above_LE, "idle_LG": counts.unrouted_LG} if counts.unrouted_LG.size else {}),
        },
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
        load=active_against_target(counts.choices_LC, counts.tokens_LG, groups, stats.active_target),
        target_G=np.array([stats.active_target.get(group.name, np.nan) for group in groups], np.float64),
        mixture_of_depths=depths,
        levers=stats.levers,
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


def depth_metrics(depths: DepthStatistics) -> dict[str, np.ndarray]:
    """Returns metrics of each mixture-of-depths layer, float64 [L]; nan for a layer without tokens.

    `computed` is the fraction of all tokens that the layer computes, `computed_by_group` [L, G] the fraction of each
    group's tokens. Training adds `agreement`, the fraction of tokens for which the causal decision equals the top-k
    selection of training, and `gate_weight`, the mean gate weight of computed tokens.
    """
    tokens_L, taken_L = depths.tokens_LG.sum(1), depths.taken_LG.sum(1)
    metrics = {
        "computed": divide(taken_L, tokens_L),
        "computed_by_group": divide(depths.taken_LG, depths.tokens_LG),
    }
    if depths.agreed_L is not None:
        metrics["agreement"] = divide(depths.agreed_L, tokens_L)
    if depths.weight_L is not None:
        metrics["gate_weight"] = divide(depths.weight_L, taken_L)
    return metrics


def depth_line(depths: DepthStatistics) -> dict[str, Any]:
    """Returns the value of `mixture_of_depths` in a line of metrics.jsonl: `depth_metrics` as lists over the `layers`."""
    metrics = depth_metrics(depths)
    by_group_LG = metrics.pop("computed_by_group")
    return {
        "layers": list(depths.layers),
        "target": depths.token_share,
        **{name: values_L.tolist() for name, values_L in metrics.items()},
        "computed_by_group": dict(zip(depths.groups, by_group_LG.T.tolist(), strict=True)),
    }


def depth_scalars(depths: DepthStatistics, *, split: bool) -> dict[str, float | None]:
    """Returns the scalars of the mixture-of-depths layers. Each fraction divides a sum over layers by a sum over layers.
    Without `split`, mixture_of_depths/computed/mean is the mean over the groups that had tokens."""
    taken_G, tokens_G = depths.taken_LG.sum(0), depths.tokens_LG.sum(0)
    shares = {name: ratio(taken_G[g], tokens_G[g]) for g, name in enumerate(depths.groups)}
    if not split:
        shares = {"mean": reduce_known(np.array(list(shares.values()), dtype=np.float64))}  # None becomes nan
    scalars = {f"mixture_of_depths/{DEPTH_FAMILY}/{name}": value for name, value in shares.items()}
    if depths.agreed_L is not None:
        scalars["mixture_of_depths/agreement"] = ratio(depths.agreed_L.sum(), tokens_G.sum())
    if depths.weight_L is not None:
        scalars["mixture_of_depths/gate_weight"] = ratio(depths.weight_L.sum(), taken_G.sum())
    return scalars


def slowest_rank(busy_seconds_W: np.ndarray) -> dict[str, float]:
    """Returns the rank that computed longest, the rank's seconds, and the other ranks' median seconds; empty for a single
    rank."""
    if busy_seconds_W.size < 2:
        return {}
    rank = int(busy_seconds_W.argmax())
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": float(busy_seconds_W[rank]),
        "other_ranks_seconds": float(np.median(np.delete(busy_seconds_W, rank))),
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
    return {f"{NEEDED}{group.name}": most for group, most in pairs if most and group.token_share is None}


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


class GroupChoices(NamedTuple):
    """One group's columns of `choices_LC`, divided into true, null, identity and constant experts."""

    true_Ln: np.ndarray
    null_Lm: np.ndarray
    identity_Li: np.ndarray
    constant_Lc: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Returns the number of choices of the group's columns in each layer, [L]."""
        return np.sum([part.sum(1) for part in self], axis=0)


def group_choices(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> list[GroupChoices]:
    """Splits `choices_LC`, with columns in the order of `moe_dist.moe.routing.types.group_columns`, by group."""
    counts = [(g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in groups]
    by_kind = [count for kind in zip(*counts, strict=True) for count in kind]
    parts = np.split(choices_LC, np.cumsum(by_kind)[:-1], axis=1)
    return [GroupChoices(*parts[index :: len(groups)]) for index in range(len(groups))]


def group_metrics(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], *, dropped_LG: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Computes each of `tags.GROUP_FAMILIES`, float64 [L, G]; nan where no token was routed.

    experts_per_token counts true experts after a capacity dropped pairs; the other families count all choices.
    capacity_used is the busiest expert's load divided by the even load, which a capacity factor of 1 allows. For T tokens
    the even load of an expert is k T / (columns of the group) if tokens choose k experts, and c T if experts choose with
    capacity c.
    """
    metrics = {name: np.full(tokens_LG.shape, np.nan) for name in GROUP_FAMILIES}
    dropped_LG = np.zeros_like(tokens_LG) if dropped_LG is None else dropped_LG
    for g, (group, choices) in enumerate(zip(groups, group_choices(choices_LC, groups), strict=True)):
        true_Ln, tokens_L = choices.true_Ln, tokens_LG[:, g]
        metrics["experts_per_token"][:, g] = divide(true_Ln.sum(1) - dropped_LG[:, g], tokens_L)
        metrics["null_fraction"][:, g] = divide(choices.null_Lm.sum(1), choices.total)
        metrics["load_imbalance"][:, g] = busiest_over_mean(true_Ln)
        even_L = tokens_L * group.expected_experts_per_token / group.num_experts
        metrics["capacity_used"][:, g] = divide(true_Ln.max(1), even_L)
    return metrics


def group_scalars(
    choices_LC: np.ndarray,
    tokens_LG: np.ndarray,
    groups: Sequence[ExpertGroup],
    *,
    split: Sequence[str],
    dropped_LG: np.ndarray,
) -> dict[str, float | None]:
    """Returns moe/<family>/<group> for each family in `split`, and for other families moe/<family>/mean, the mean over the
    groups with tokens."""
    over_layers = [counts.sum(0, keepdims=True) for counts in (choices_LC, tokens_LG, dropped_LG)]
    summed = group_metrics(over_layers[0], over_layers[1], groups, dropped_LG=over_layers[2])
    layers = group_metrics(choices_LC, tokens_LG, groups)
    reduced = {  # family of tags -> (metrics of sums over layers, or of each layer; reduction over layers)
        "experts_per_token": (summed, np.mean),
        "null_fraction": (summed, np.mean),
        "load_imbalance": (layers, np.mean),
        "capacity_used": (layers, np.max),
    }
    scalars: dict[str, float | None] = {}
    for family, (metrics, reduce) in reduced.items():
        values = [reduce_known(values_L, reduce) for values_L in metrics[family].T]
        if family in split:
            scalars |= {f"moe/{family}/{group.name}": value for group, value in zip(groups, values, strict=True)}
        else:
            scalars[f"moe/{family}/mean"] = reduce_known(np.array(values, dtype=np.float64))  # None becomes nan
    return scalars


def rows_by_rank(pairs_LC: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Sums the true experts' columns of `pairs_LC` by the EP rank that holds the expert, [L, R]. If `pairs_LC` counts the
    pairs that a capacity kept, the result is the number of pairs that each EP rank computes, summed over all EP groups."""
    return placement.by_rank(pairs_LC[:, : placement.num_experts])


def weighted_rows(choices_LC: np.ndarray, rows_LR: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Returns the work of each EP rank, float64 [L, R]: the rank's computed (token, expert) pairs times the pairs' mean FFN
    width."""
    width_E = np.array(placement.width_of_expert, dtype=np.float64)
    choices_LE = choices_LC[:, : placement.num_experts]  # counted before a capacity drops pairs
    width_LR = divide(rows_by_rank(choices_LE * width_E, placement), rows_by_rank(choices_LE, placement))
    return rows_LR * np.nan_to_num(width_LR)  # a rank without choices has no width and no rows


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


def perf_scalars(stats: StepStatistics, peak_flops: float | None) -> dict[str, float | None]:
    """Returns throughput. mfu = FLOPs per token x tokens per second / `peak_flops` (Chowdhery et al. 2022, appendix B)."""
    rate = ratio(stats.result.tokens, stats.step_seconds)
    mfu = rate * stats.flops_per_token / peak_flops if rate and stats.flops_per_token and peak_flops else None
    return {"perf/tokens_per_second": rate, "perf/step_seconds": stats.step_seconds, "perf/mfu": mfu}


def busiest_over_mean(load_LX: np.ndarray) -> np.ndarray:
    """Returns each layer's largest load divided by the layer's mean load, float64 [L]; nan for a layer without load."""
    return divide(load_LX.max(1), load_LX.mean(1))


def reduce_known(values: np.ndarray, reduce: Callable[[np.ndarray], Any] = np.mean) -> float | None:
    """Reduces the values that are not nan; None if all values are nan."""
    known = values[~np.isnan(values)]  # nan marks a layer or group without tokens
    return float(reduce(known)) if known.size else None


def ratio(over: float, under: float) -> float | None:
    """Returns `over / under`; None if `under` is 0, because the quantity is then unknown."""
    return float(over) / float(under) if under else None


def divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Returns `over` / `under` as float64; nan where `under` is zero."""
    result = np.full(np.broadcast(over, under).shape, np.nan)
    np.divide(over, under, out=result, where=np.asarray(under) != 0)  # `where` avoids numpy's warnings
    return result
