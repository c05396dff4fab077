"""Computes, from the statistics of a step, the record that every sink shows. Pure functions.

Shape letters: L MoE layers, G groups, C choice columns (all true experts by logical id, then null, identity and constant
ones), E true experts of all groups, n true experts of one group, R ranks of an EP group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_dist.config.manifest import RESERVED_MODALITIES
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult, StepResult, StepStatistics
from moe_dist.monitor.tags import DEPTH_FAMILY, GROUP_FAMILIES, tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@dataclass(frozen=True)
class Record:
    """One step as shown and stored.

    Attributes:
        step: Steps taken, this one included.
        skipped: Whether the step was skipped on all ranks.
        scalars: Value by tag (`tags.MEANING`); None if the step has no value, nan or inf if it was computed so.
        losses: Nats per token by modality; None if the step had no label of it.
        labels: Unmasked labels by modality.
        epochs: Epochs seen of each modality.
        balance_coefficient: Coefficient of the balance loss.
        arrays: choices_LC, tokens_LG, rows_LR and dropped_LG as counted (int64), entropy_LG in nats per token and
            weighted_rows_LR in rows x FFN width (float64); with expert choice also above_LE and idle_LG.
        ledger: The dispatch ledger, see `StepStatistics`.
        host: Readings of the host that are not scalars, by name; the slowest rank, its seconds, and the others' median.
        busy_seconds_W: Seconds in which each rank computed and read data in the step before; empty if unknown.
        load: For each group of a load controller: its `target`, the `achieved` true experts per token (choices before any
            capacity, mean over layers), and the `lowest` and `highest` layer; None if the step had no token of it.
        mixture_of_depths: Sums of the mixture-of-depths layers; None without any.
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
    host: Mapping[str, float | None] = field(default_factory=dict)
    busy_seconds_W: np.ndarray = field(default_factory=lambda: np.zeros(0))
    load: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    mixture_of_depths: DepthStatistics | None = None


def build_record(
    stats: StepStatistics,
    *,
    groups: Sequence[ExpertGroup],
    placement: ExpertPlacement,
    modalities: Sequence[str],
    readings: Mapping[str, float | None] | None = None,
    peak_flops: float | None = None,
) -> Record:
    """The record of a step.

    Args:
        stats: Global sums of the step.
        groups: Groups in the order of the columns G.
        placement: Which rank holds which expert.
        modalities: All modalities of the data, in the manifest's order.
        readings: Latest readings of `devices.DeviceMonitor`: device/... become scalars, the others `Record.host`.
        peak_flops: Peak FLOPs per second of all devices together; None leaves perf/mfu empty.

    Raises:
        ValueError: a modality has the name of a loss term.
    """
    result, counts = stats.result, stats.result.counts
    depths = result.mixture_of_depths
    plan = tag_plan(len(groups), len(modalities), mixture_of_depths=depths is not None)
    readings = readings or {}
    labels = dict(zip(modalities, result.labels_M.tolist(), strict=True))
    losses = {name: _ratio(nll, labels[name]) for name, nll in zip(modalities, result.nll_M.tolist(), strict=True)}
    epochs = {name: float(stats.epochs.get(name, 0.0)) for name in modalities}
    rows_LR = rows_by_rank(counts.choices_LC[:, : placement.num_experts] - counts.dropped_LE, placement)
    weighted_LR = weighted_rows(counts.choices_LC, rows_LR, placement)
    dropped_LG = np.stack([counts.dropped_LE[:, group.experts].sum(1) for group in groups], axis=1)
    scalars = {
        **loss_scalars(result, losses, split=plan.loss_per_modality),
        "optim/lr": stats.lr,
        "optim/grad_norm": result.grad_norm,
        "optim/skipped_steps": float(stats.skipped_steps),
        "optim/tokens": float(stats.tokens),
        **group_scalars(counts.choices_LC, counts.tokens_LG, groups, split=plan.by_group, dropped_LG=dropped_LG),
        "moe/rank_imbalance": layer_mean(busiest_over_mean(weighted_LR)),
        "moe/dropped": float(dropped_LG.sum()),
        "moe/dead_experts": float((counts.choices_LC[:, : placement.num_experts] == 0).sum()),
        "moe/router_entropy": _ratio(counts.entropy_LG.sum(), counts.tokens_LG.sum()),
        **comm_scalars(result.ledger, result.comm_seconds),
        **perf_scalars(stats, peak_flops),
        **{f"device/{name}": readings.get(f"device/{name}") for name in ("utilisation", "memory", "power")},
        **_epoch_scalars(epochs, plan.epochs_per_modality),
        **({} if depths is None else depth_scalars(depths, split=DEPTH_FAMILY in plan.by_group)),
    }
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
            "entropy_LG": _divide(counts.entropy_LG, counts.tokens_LG),
            "weighted_rows_LR": weighted_LR,
            **({"above_LE": counts.above_LE, "idle_LG": counts.unrouted_LG} if counts.unrouted_LG.size else {}),
        },
        ledger=dict(result.ledger),
        host={
            **{name: value for name, value in readings.items() if not name.startswith("device/")},
            **slowest_rank(result.busy_seconds_W),
        },
        busy_seconds_W=result.busy_seconds_W,
        load=active_against_target(counts.choices_LC, counts.tokens_LG, groups, stats.active_target),
        mixture_of_depths=depths,
    )


def active_against_target(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], target: Mapping[str, float]
) -> dict[str, dict[str, float | None]]:
    """`Record.load`: target and measured true experts per token of each controlled group."""
    chosen_LG = group_metrics(choices_LC, tokens_LG, groups)["experts_per_token"]
    found: dict[str, dict[str, float | None]] = {}
    for index, group in enumerate(groups):
        if group.name in target:
            known_L = chosen_LG[:, index][~np.isnan(chosen_LG[:, index])]
            loads = (known_L.mean(), known_L.min(), known_L.max()) if known_L.size else (None, None, None)
            achieved, lowest, highest = (None if load is None else float(load) for load in loads)
            found[group.name] = {
                "target": target[group.name], "achieved": achieved, "lowest": lowest, "highest": highest
            }  # fmt: skip
    return found


def evaluation_scalars(result: EvaluationResult, modalities: Sequence[str], num_groups: int) -> dict[str, float | None]:
    """Scalars of a held-out evaluation: eval/..., the two balance efficiencies if measured, and
    mixture_of_depths/load_over_target, a mean over the mixture-of-depths layers.

    With more modalities than fit, eval/mean is the mean over their tokens.
    """
    scalars: dict[str, float | None]
    if tag_plan(num_groups, len(modalities), mixture_of_depths=result.mixture_of_depths is not None).loss_per_modality:
        scalars = {f"eval/{name}": float(value) for name, value in result.loss.items()}
    else:
        named = [name for name in modalities if name in result.loss]
        nats = sum(result.loss[name] * result.tokens[name] for name in named)
        scalars = {"eval/mean": _ratio(nats, sum(result.tokens[name] for name in named))}
    if result.balance_efficiency_by_count is not None:
        scalars["moe/balance_efficiency_by_count"] = result.balance_efficiency_by_count
    if result.balance_efficiency is not None:
        scalars["perf/balance_efficiency"] = result.balance_efficiency
    if result.mixture_of_depths is not None:
        scalars["mixture_of_depths/load_over_target"] = layer_mean(
            depth_computed(result.mixture_of_depths) / result.mixture_of_depths.capacity
        )
    return scalars


def depth_computed(mixture_of_depths: DepthStatistics) -> np.ndarray:
    """Share of the tokens that each mixture-of-depths layer computes, float64 [L]; nan without tokens."""
    return _divide(mixture_of_depths.taken_LG.sum(1), mixture_of_depths.tokens_LG.sum(1))


def depth_metrics(mixture_of_depths: DepthStatistics) -> dict[str, np.ndarray]:
    """For each mixture-of-depths layer, float64 [L]; nan without tokens. `computed` is the share of computed tokens,
    `computed_by_group` [L, G] that of each group. In training also `agreement`, the share of tokens whose causal decision
    equals the selection, and `gate_weight`, a mean over computed tokens."""
    metrics = {
        "computed": depth_computed(mixture_of_depths),
        "computed_by_group": _divide(mixture_of_depths.taken_LG, mixture_of_depths.tokens_LG),
    }
    if mixture_of_depths.agreed_L is not None:
        metrics["agreement"] = _divide(mixture_of_depths.agreed_L, mixture_of_depths.tokens_LG.sum(1))
    if mixture_of_depths.weight_L is not None:
        metrics["gate_weight"] = _divide(mixture_of_depths.weight_L, mixture_of_depths.taken_LG.sum(1))
    return metrics


def depth_line(mixture_of_depths: DepthStatistics) -> dict[str, Any]:
    """The field of metrics.jsonl: lists by layer, with the `layers` and their `target`."""
    metrics = depth_metrics(mixture_of_depths)
    by_group_LG = metrics.pop("computed_by_group")
    return {
        "layers": list(mixture_of_depths.layers),
        "target": mixture_of_depths.capacity,
        **{name: values_L.tolist() for name, values_L in metrics.items()},
        "computed_by_group": {name: by_group_LG[:, g].tolist() for g, name in enumerate(mixture_of_depths.groups)},
    }


def depth_scalars(mixture_of_depths: DepthStatistics, *, split: bool) -> dict[str, float | None]:
    """mixture_of_depths/computed/<group>, or mixture_of_depths/computed/mean over the groups that had tokens;
    mixture_of_depths/agreement and mixture_of_depths/gate_weight. Shares are of sums over layers."""
    taken_G, tokens_G = mixture_of_depths.taken_LG.sum(0), mixture_of_depths.tokens_LG.sum(0)
    shares = {name: _ratio(taken_G[g], tokens_G[g]) for g, name in enumerate(mixture_of_depths.groups)}
    if not split:
        shares = {"mean": _mean_of_known(list(shares.values()))}
    scalars = {f"mixture_of_depths/{DEPTH_FAMILY}/{name}": value for name, value in shares.items()}
    if mixture_of_depths.agreed_L is not None:
        scalars["mixture_of_depths/agreement"] = _ratio(mixture_of_depths.agreed_L.sum(), mixture_of_depths.tokens_LG.sum())
    if mixture_of_depths.weight_L is not None:
        scalars["mixture_of_depths/gate_weight"] = _ratio(
            mixture_of_depths.weight_L.sum(), mixture_of_depths.taken_LG.sum()
        )
    return scalars


def slowest_rank(busy_seconds_W: np.ndarray) -> dict[str, float]:
    """The rank that computed longest, its seconds, and the median of the others; empty with a single rank."""
    if busy_seconds_W.size < 2:
        return {}
    rank = int(busy_seconds_W.argmax())
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": float(busy_seconds_W[rank]),
        "other_ranks_seconds": float(np.median(np.delete(busy_seconds_W, rank))),
    }


def loss_scalars(result: StepResult, losses: Mapping[str, float | None], *, split: bool) -> dict[str, float | None]:
    """loss/total = nats of all modalities / labels of all + balance, z and auxiliary terms; and the terms themselves.
    loss/auxiliary appears with auxiliary routers or router tuning.

    Raises:
        ValueError: a modality has the name of a loss term.
    """
    taken = sorted(set(losses if split else ()) & set(RESERVED_MODALITIES))
    if taken:
        raise ValueError(f"modalities: {taken} are names of loss terms; rename them in the manifest")
    nats = _ratio(sum(result.nll_M.tolist()), sum(result.labels_M.tolist()))
    total = None if nats is None else nats + result.balance + result.z + result.auxiliary
    # Auxiliary routers and router tuning have no z-loss, so their term can take its place among the 40 scalars.
    third = {"loss/auxiliary": result.auxiliary} if result.auxiliary else {"loss/z": result.z}
    by_modality = {f"loss/{name}": value for name, value in losses.items()} if split else {}
    return {"loss/total": total, **by_modality, "loss/balance": result.balance, **third}


class GroupChoices(NamedTuple):
    """A group's columns of `choices_LC`: true, null, identity and constant experts."""

    true_Ln: np.ndarray
    null_Lm: np.ndarray
    identity_Li: np.ndarray
    constant_Lc: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """All of the group's choices in each layer, [L]."""
        return np.sum([part.sum(1) for part in self], axis=0)


def group_choices(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> list[GroupChoices]:
    """For each group its columns of `choices_LC`, in the order of `moe_dist.moe.routing.group_columns`."""
    counts = [(g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in groups]
    by_kind = [count for kind in zip(*counts, strict=True) for count in kind]
    parts = np.split(choices_LC, np.cumsum(by_kind)[:-1], axis=1)
    return [GroupChoices(*parts[index :: len(groups)]) for index in range(len(groups))]


def group_metrics(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], *, dropped_LG: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Each of `tags.GROUP_FAMILIES` as float64 [L, G]; nan if no token was routed.

    experts_per_token counts true experts after a capacity dropped pairs; the others count all choices. capacity_used
    divides by the even share k T / (columns of the group), which is the capacity at factor 1; with expert choice by c T.
    """
    metrics = {name: np.full(tokens_LG.shape, np.nan) for name in GROUP_FAMILIES}
    dropped_LG = np.zeros_like(tokens_LG) if dropped_LG is None else dropped_LG
    for g, (group, choices) in enumerate(zip(groups, group_choices(choices_LC, groups), strict=True)):
        true_Ln, tokens_L = choices.true_Ln, tokens_LG[:, g]
        metrics["experts_per_token"][:, g] = _divide(true_Ln.sum(1) - dropped_LG[:, g], tokens_L)
        metrics["null_fraction"][:, g] = _divide(choices.null_Lm.sum(1), choices.total)
        metrics["load_imbalance"][:, g] = busiest_over_mean(true_Ln)
        even_L = tokens_L * group.expected_experts_per_token / group.num_experts
        metrics["capacity_used"][:, g] = _divide(true_Ln.max(1), even_L)
    return metrics


def group_scalars(
    choices_LC: np.ndarray,
    tokens_LG: np.ndarray,
    groups: Sequence[ExpertGroup],
    *,
    split: Sequence[str],
    dropped_LG: np.ndarray | None = None,
) -> dict[str, float | None]:
    """moe/<family>/<group> for the families in `split`, for the others moe/<family>/mean over the groups that had tokens.

    Over layers, shares are of the sums, load_imbalance is the mean and capacity_used the maximum.
    """
    dropped_LG = np.zeros_like(tokens_LG) if dropped_LG is None else dropped_LG
    over_layers = [counts.sum(0, keepdims=True) for counts in (choices_LC, tokens_LG, dropped_LG)]
    summed = group_metrics(over_layers[0], over_layers[1], groups, dropped_LG=over_layers[2])
    layers = group_metrics(choices_LC, tokens_LG, groups)
    by_family: dict[str, list[float | None]] = {
        "experts_per_token": [layer_mean(summed["experts_per_token"][:, g]) for g in range(len(groups))],
        "null_fraction": [layer_mean(summed["null_fraction"][:, g]) for g in range(len(groups))],
        "load_imbalance": [layer_mean(layers["load_imbalance"][:, g]) for g in range(len(groups))],
        "capacity_used": [_layer_max(layers["capacity_used"][:, g]) for g in range(len(groups))],
    }
    scalars: dict[str, float | None] = {}
    for family, values in by_family.items():
        if family in split:
            scalars |= {f"moe/{family}/{group.name}": value for group, value in zip(groups, values, strict=True)}
        else:
            scalars[f"moe/{family}/mean"] = _mean_of_known(values)
    return scalars


def rows_by_rank(taken_LC: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """(token, expert) pairs computed at each EP position, [L, R], summed over the EP groups.

    Args:
        taken_LC: Pairs of each true expert after a capacity dropped some; later columns are ignored.
    """
    rank_E = np.array(placement.rank_of_expert)
    true_LE = taken_LC[:, : placement.num_experts]
    return np.stack([true_LE[:, rank_E == rank].sum(1) for rank in range(placement.num_ranks)], axis=1)


def weighted_rows(choices_LC: np.ndarray, rows_LR: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Work of each rank, float64 [L, R]: its computed rows times the mean FFN width of its experts' choices (choices before
    a capacity drops any)."""
    width_E = np.array([group.ffn_dim for group in placement.groups for _ in group.experts], dtype=np.float64)
    on_rank_ER = np.zeros((placement.num_experts, placement.num_ranks))
    on_rank_ER[np.arange(placement.num_experts), list(placement.rank_of_expert)] = 1.0
    choices_LE = choices_LC[:, : placement.num_experts]
    width_LR = _divide((choices_LE * width_E) @ on_rank_ER, choices_LE @ on_rank_ER)
    return rows_LR * np.nan_to_num(width_LR)


def comm_scalars(ledger: Mapping[str, int], seconds: float) -> dict[str, float | None]:
    """Communication, from the dispatch ledger. Other methods are assumed to send as many bytes per row as ours.

    Metadata bytes are left out, as in the dispatch contract; the record's ledger has them.
    """
    ours = ledger["rows_remote"]
    row_bytes = _ratio(ledger["payload_bytes"], ours)  # over all exchanges of the step, also recomputed ones

    def saved(rows: int) -> float | None:
        if row_bytes is None:  # no row was sent, so the bytes of a row are unknown
            return None if rows else 0.0
        return (rows - ours) * row_bytes

    return {
        "comm/bytes_sent": float(ledger["payload_bytes"]),
        "comm/bytes_saved_vs_topk": saved(ledger["rows_topk"]),
        "comm/bytes_saved_vs_same_active": saved(ledger["rows_same_active"]),
        "comm/dedup_factor": _ratio(ledger["rows_per_pair"], ours),
        "comm/seconds": seconds,
    }


def perf_scalars(stats: StepStatistics, peak_flops: float | None) -> dict[str, float | None]:
    """Throughput. mfu = FLOPs per token x tokens per second / `peak_flops` (Chowdhery et al. 2022, appendix B)."""
    rate = _ratio(stats.result.tokens, stats.step_seconds)
    mfu = rate * stats.flops_per_token / peak_flops if rate and stats.flops_per_token and peak_flops else None
    return {"perf/tokens_per_second": rate, "perf/step_seconds": stats.step_seconds, "perf/mfu": mfu}


def busiest_over_mean(load_LX: np.ndarray) -> np.ndarray:
    """Largest over mean of each row, float64 [L]; nan if the row has no load."""
    return _divide(load_LX.max(1), load_LX.mean(1))


def layer_mean(values_L: np.ndarray) -> float | None:
    """Mean over the layers that have a value."""
    known = values_L[~np.isnan(values_L)]
    return float(known.mean()) if known.size else None


def _layer_max(values_L: np.ndarray) -> float | None:
    known = values_L[~np.isnan(values_L)]
    return float(known.max()) if known.size else None


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    return layer_mean(np.array([np.nan if value is None else value for value in values]))


def _epoch_scalars(epochs: Mapping[str, float], per_modality: bool) -> dict[str, float | None]:
    if per_modality:
        return {f"data/epochs/{name}": value for name, value in epochs.items()}
    return {"data/epochs/max": max(epochs.values(), default=0.0)}


def _ratio(over: float, under: float) -> float | None:
    return float(over) / float(under) if under else None


def _divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Quotient as float64; nan where `under` is zero."""
    result = np.full(np.broadcast(over, under).shape, np.nan)
    np.divide(over, under, out=result, where=np.asarray(under) != 0)
    return result
