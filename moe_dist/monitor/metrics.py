"""Defines the record of a step, which sinks show and store. Computes its numbers from counts. All functions are pure.

Shape letters: L MoE layers, G groups, C choice columns (all true experts by logical id, then null, identity and constant
experts), E true experts of all groups, n true experts of one group, R ranks of an EP group, W ranks of the world.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.monitor.statistics import DepthStatistics, EvaluationResult, LeverDecision, WeightTable
from moe_dist.monitor.tags import DEPTH_FAMILY, GROUP_FAMILIES, TagPlan, tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement

NEEDED = "needed_capacity_factor/"  # begins a group's key in `Record.host`: the least capacity factor without drops


@dataclass(frozen=True)
class Record:
    """The data of one step. Sinks show and store them.

    Attributes:
        step: Number of the step; the first step of a run is 1.
        skipped: True if no rank took the optimizer step.
        scalars: Maps a tag to its number (`tags.MEANING`). None means that the step lacks the number; nan and inf are
            results of a computation.
        losses: Loss in nats per token, by modality. It is None if the step had no label of the modality.
        labels: Number of unmasked labels by modality.
        epochs: Number of passes over the training data so far, by modality.
        arrays: int64 counts choices_LC, tokens_LG, rows_LR and dropped_LG; float64 entropy_LG (nats per token) and
            weighted_rows_LR (computed pairs x FFN width). With expert choice also above_LE (number of tokens above the
            threshold) and idle_LG (number of tokens without an expert).
        ledger: Counts of bytes and rows in dispatch and combine (`moe_dist.moe.dispatch.ledger`).
        host: Readings of CPU and memory on rank 0's machine, busy seconds of the slowest rank and of the other ranks, the
            largest memory of any rank, the peak rate by which perf/mfu divides, and `NEEDED` factors.
        busy_seconds_W: Seconds that each rank worked in the previous step, not counting waits; empty in the first step.
        memory_W3: Allocated MiB, reserved MiB and number of retries of each rank's allocator; empty in the first step.
        data_D2: For each rank with data of its own, a checksum of the token ids that it read in the previous step (0
            without tokens), and its loss in nats per label (nan without labels); empty in the first step.
        loss_scale_D: The loss from which the backward of each such rank began in the previous step, divided by the sum of
            its labels' losses (nan without labels); empty in the first step.
        words_DK: Number of token ids that each such rank read in the previous step, by the id modulo K.
        source_losses: Loss in nats per label in the previous step, by source of the data; without the sources that had no
            label.
        load: Numbers of true experts per token, before a capacity drops pairs, for each group with a load controller: the
            step's `target`, the mean over layers (`achieved`), and the numbers of the layers with the fewest (`lowest`) and
            the most (`highest`). They are None if the group had no tokens.
        target_G: float64, the target of each group in `load`; nan for a group without a target.
        mixture_of_depths: Sums of the mixture-of-depths layers; None without such layers.
        levers: Decisions that the levers of `rank_balance` made after this step.
        weights: Norms of weights and updates; None in most steps, in which they are not measured.
        problems: Kind and text of each problem that the training loop found in this step (train/loop/self_checks.py).
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
    data_D2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    loss_scale_D: np.ndarray = field(default_factory=lambda: np.zeros(0))
    words_DK: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    source_losses: Mapping[str, float] = field(default_factory=dict)
    load: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    target_G: np.ndarray = field(default_factory=lambda: np.zeros(0))
    mixture_of_depths: DepthStatistics | None = None
    levers: Sequence[LeverDecision] = ()
    weights: WeightTable | None = None
    problems: Sequence[tuple[str, str]] = ()


def routing_scalars(
    counts: RoutingCounts[np.ndarray], arrays: Mapping[str, np.ndarray], placement: ExpertPlacement, plan: TagPlan
) -> dict[str, float | None]:
    """Returns the scalars moe/... of a step, from its counts and their `routing_arrays`."""
    options = {"split": plan.by_group, "dropped_LG": arrays["dropped_LG"]}
    return {
        **group_scalars(counts.choices_LC, counts.tokens_LG, placement.groups, **options),
        "moe/rank_imbalance": reduce_known(busiest_over_mean(arrays["weighted_rows_LR"])),
        "moe/dropped_share": ratio(arrays["dropped_LG"].sum(), counts.choices_LC[:, : placement.num_experts].sum()),
        "moe/dead_experts": float((counts.choices_LC[:, : placement.num_experts] == 0).sum()),
        "moe/router_entropy": ratio(counts.entropy_LG.sum(), counts.tokens_LG.sum()),
    }


def routing_arrays(counts: RoutingCounts[np.ndarray], placement: ExpertPlacement) -> dict[str, np.ndarray]:
    """Computes `Record.arrays` from the counts of a step."""
    rows_LR = rows_by_rank(counts.choices_LC[:, : placement.num_experts] - counts.dropped_LE, placement)
    arrays = {
        "choices_LC": counts.choices_LC,
        "tokens_LG": counts.tokens_LG,
        "rows_LR": rows_LR,
        "dropped_LG": np.stack([counts.dropped_LE[:, group.experts].sum(1) for group in placement.groups], axis=1),
        "entropy_LG": divide(counts.entropy_LG, counts.tokens_LG),  # mean over tokens
        "weighted_rows_LR": weighted_rows(counts.choices_LC, rows_LR, placement),
    }
    if counts.above_LE is not None and counts.unrouted_LG is not None:
        arrays |= {"above_LE": counts.above_LE, "idle_LG": counts.unrouted_LG}
    return arrays


def comm_scalars(ledger: Mapping[str, int], seconds: float | None) -> dict[str, float | None]:
    """Returns the scalars of the step's communication. They do not contain metadata bytes.

    For other dispatch methods, bytes are estimated: the method's number of rows times this step's bytes per row (including
    padding rows).
    """
    ours = ledger["rows_remote"] + ledger.get("rows_padding", 0)
    row_bytes = ratio(ledger["payload_bytes"], ours)  # includes forward, backward and recomputation

    def saved(rows: int) -> float | None:
        if row_bytes is None:  # no row was sent, so the bytes per row are unknown
            return None if rows else 0.0
        return (rows - ours) * row_bytes

    return {
        "comm/bytes_sent": float(ledger["payload_bytes"]),
        "comm/bytes_saved_vs_topk": saved(ledger["rows_topk"]),
        "comm/bytes_saved_vs_same_active": saved(ledger["rows_same_active"]),
        "comm/dedup_factor": ratio(ledger["rows_per_pair"], ours),
        "comm/seconds": seconds,
    }


def depth_metrics(depths: DepthStatistics) -> dict[str, np.ndarray]:
    """Returns metrics of each mixture-of-depths layer, float64 [L]. They are nan for a layer without tokens.

    `computed` is the fraction of all tokens that the layer computes, and `computed_by_group` [L, G] the fraction of each
    group's tokens. Two metrics exist only in training: `agreement`, the fraction of tokens for which the causal decision
    equals training's top-k selection; and `gate_weight`, the mean gate weight of the computed tokens.
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
    """Returns the value of `mixture_of_depths` for a line of metrics.jsonl: `depth_metrics`, as lists over the `layers`."""
    metrics = depth_metrics(depths)
    by_group_LG = metrics.pop("computed_by_group")
    return {
        "layers": list(depths.layers),
        "target": depths.token_share,
        **{name: values_L.tolist() for name, values_L in metrics.items()},
        "computed_by_group": dict(zip(depths.groups, by_group_LG.T.tolist(), strict=True)),
    }


def depth_scalars(depths: DepthStatistics, *, split: bool) -> dict[str, float | None]:
    """Returns the scalars of the mixture-of-depths layers. Each fraction is a sum over layers divided by a sum over layers.
    Without `split`, mixture_of_depths/computed/mean is the mean over those groups that had tokens."""
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


def evaluation_scalars(result: EvaluationResult, modalities: Sequence[str], num_groups: int) -> dict[str, float | None]:
    """Returns the scalars of a held-out evaluation: eval/..., the measured balance efficiencies, and the mean of
    mixture_of_depths/load_over_target over the mixture-of-depths layers.

    If there are too many modalities for one scalar each, eval/mean is the mean loss over the tokens of all modalities.
    """
    scalars: dict[str, float | None]
    depths = result.mixture_of_depths
    if tag_plan(num_groups, len(modalities), mixture_of_depths=depths is not None).loss_per_modality:
        scalars = {f"eval/{name}": float(value) for name, value in result.loss.items()}
    else:
        named = [name for name in modalities if name in result.loss]
        nats = sum(result.loss[name] * result.tokens[name] for name in named)
        scalars = {"eval/mean": ratio(nats, sum(result.tokens[name] for name in named))}
    if result.balance_efficiency_by_count is not None:
        scalars["moe/balance_efficiency_by_count"] = result.balance_efficiency_by_count
    if result.balance_efficiency is not None:
        scalars["perf/balance_efficiency"] = result.balance_efficiency
    if depths is not None:
        scalars["mixture_of_depths/load_over_target"] = reduce_known(depth_metrics(depths)["computed"] / depths.token_share)
    return scalars


def slowest_rank(busy_seconds_W: np.ndarray) -> dict[str, float]:
    """Returns the slowest rank, its seconds, and the median seconds of the other ranks. Returns {} for a single rank."""
    if busy_seconds_W.size < 2:
        return {}
    rank = int(busy_seconds_W.argmax())
    return {
        "slowest_rank": rank,
        "slowest_rank_seconds": float(busy_seconds_W[rank]),
        "other_ranks_seconds": float(np.median(np.delete(busy_seconds_W, rank))),
    }


class GroupChoices(NamedTuple):
    """The columns of `choices_LC` that belong to one group, split into true, null, identity and constant experts."""

    true_Ln: np.ndarray
    null_Lm: np.ndarray
    identity_Li: np.ndarray
    constant_Lc: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Returns the number of choices of the group's columns in each layer, [L]."""
        return np.sum([part.sum(1) for part in self], axis=0)


def group_choices(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> list[GroupChoices]:
    """Splits `choices_LC` by group. Its columns have the order of `moe_dist.moe.routing.types.group_columns`."""
    counts = [(g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in groups]
    by_kind = [count for kind in zip(*counts, strict=True) for count in kind]
    parts = np.split(choices_LC, np.cumsum(by_kind)[:-1], axis=1)
    return [GroupChoices(*parts[index :: len(groups)]) for index in range(len(groups))]


def group_metrics(
    choices_LC: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup], *, dropped_LG: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Computes each metric of `tags.GROUP_FAMILIES`, float64 [L, G]; nan where no token was routed.

    experts_per_token counts true experts after a capacity dropped pairs; the other metrics count all choices. capacity_used
    is the busiest expert's load divided by the even load, which a capacity factor of 1 allows. For T tokens the even load
    of an expert is k T / (columns of the group) if each token chooses k experts, and c T if experts choose tokens with
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
    """Returns the values by tag. A family in `split` has a tag moe/<family>/<group> for each group. Another family has
    the tag moe/<family>/mean, the mean over groups with tokens."""
    over_layers = [counts.sum(0, keepdims=True) for counts in (choices_LC, tokens_LG, dropped_LG)]
    summed = group_metrics(over_layers[0], over_layers[1], groups, dropped_LG=over_layers[2])
    layers = group_metrics(choices_LC, tokens_LG, groups)
    reduced = {  # family of tags -> (metrics of the sum over layers or of each layer; function that reduces over layers)
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
    """Sums the true experts' columns of `pairs_LC` by the experts' EP ranks, [L, R]. If `pairs_LC` counts the pairs that a
    capacity kept, the result is the number of pairs that each EP rank computes, summed over all EP groups."""
    return placement.by_rank(pairs_LC[:, : placement.num_experts])


def weighted_rows(choices_LC: np.ndarray, rows_LR: np.ndarray, placement: ExpertPlacement) -> np.ndarray:
    """Returns the work of each EP rank, float64 [L, R]: its computed (token, expert) pairs x the pairs' mean FFN width."""
    width_E = np.array(placement.width_of_expert, dtype=np.float64)
    choices_LE = choices_LC[:, : placement.num_experts]  # includes pairs that a capacity drops
    width_LR = divide(rows_by_rank(choices_LE * width_E, placement), rows_by_rank(choices_LE, placement))
    return rows_LR * np.nan_to_num(width_LR)  # a rank without choices has no width and no rows


def busiest_over_mean(load_LX: np.ndarray) -> np.ndarray:
    """Returns each layer's largest load divided by its mean load, float64 [L]; nan for a layer without load."""
    return divide(load_LX.max(1), load_LX.mean(1))


def reduce_known(values: np.ndarray, reduce: Callable[[np.ndarray], Any] = np.mean) -> float | None:
    """Reduces those values that are not nan to one number. Returns None if all values are nan."""
    known = values[~np.isnan(values)]  # nan marks a layer or group without tokens
    return float(reduce(known)) if known.size else None


def ratio(over: float, under: float) -> float | None:
    """Returns `over / under`; None if `under` is 0, because the quantity is then unknown."""
    return float(over) / float(under) if under else None


def divide(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Returns `over` / `under` as float64; nan where `under` is 0."""
    result = np.full(np.broadcast(over, under).shape, np.nan)
    np.divide(over, under, out=result, where=np.asarray(under) != 0)  # `where` avoids numpy's warnings
    return result
