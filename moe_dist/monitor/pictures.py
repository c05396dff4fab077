"""Selects the heat maps and histograms of a run. They show sums over the steps since the last pictures, to average out
noise.

Shape letters as in `metrics.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_dist.monitor.heatmaps import Axis, draw, linear_scale, ratio_scale
from moe_dist.monitor.metrics import group_choices, group_metrics
from moe_dist.monitor.tags import tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@dataclass(frozen=True)
class Subject:
    """The run that the pictures show.

    Attributes:
        groups: Expert groups, in the order of the arrays' columns.
        placement: Which rank holds which expert.
        moe_layers: Index in the model of each MoE layer.
        num_modalities: Modalities of the data; with the groups it decides which tags are split.
        active_target: Target of a load controller, in true experts per token, by group.
        mixture_of_depths: Whether some layers compute only a share of the tokens.
    """

    groups: tuple[ExpertGroup, ...]
    placement: ExpertPlacement
    moe_layers: tuple[int, ...]
    num_modalities: int
    active_target: Mapping[str, float] = field(default_factory=dict)
    mixture_of_depths: bool = False

    @property
    def layer_axis(self) -> Axis:
        return Axis("layer", [str(layer) for layer in self.moe_layers])

    @property
    def group_axis(self) -> Axis:
        return Axis("group", [group.name for group in self.groups])

    def expert_axis(self, group: ExpertGroup) -> Axis:
        ranks = [self.placement.rank_of_expert[expert] for expert in group.experts]
        word = "rank " if len(ranks) <= 16 else "r"
        return Axis(
            "expert, and the rank that holds it", [str(i) for i in range(len(ranks))], [f"{word}{r}" for r in ranks]
        )


def heat_maps(sums: Mapping[str, np.ndarray], subject: Subject, steps: str) -> Iterator[tuple[str, np.ndarray]]:
    """(tag, picture) of every heat map. Layers are rows; columns are experts, ranks or groups.

    A tag must not also be a scalar's: TensorBoard shows only the first kind that it sees under a tag. Families that
    `tags.tag_plan` does not split by group become maps of layers x groups.
    """
    layers, groups = subject.layer_axis, subject.groups
    for group, load_Ln in loads(sums["choices_LC"], groups):
        scale = ratio_scale(f"choices over the mean expert's, {steps}")
        title = f"Load of the {group.name} experts"
        yield f"moe/load/{group.name}", draw(load_Ln, layers, subject.expert_axis(group), scale=scale, title=title)
    if subject.placement.num_ranks > 1:
        rows_LR = sums["weighted_rows_LR"]
        ranks = Axis("rank of the EP group", [str(rank) for rank in range(rows_LR.shape[1])])
        scale = ratio_scale(f"rows x FFN width over the mean rank's, {steps}")
        yield "moe/rank_load", draw(_over_mean(rows_LR), layers, ranks, scale=scale, title="Load of the ranks")

    metrics = group_metrics(sums["choices_LC"], sums["tokens_LG"], groups, dropped_LG=sums["dropped_LG"])
    metrics["zero_computation_fraction"] = zero_computation_fraction(sums["choices_LC"], groups)
    wanted = _per_group_maps(subject, metrics)
    if "idle_LG" in sums:
        tokens_LG = sums["tokens_LG"]
        metrics["idle_fraction"] = np.where(tokens_LG > 0, sums["idle_LG"] / np.maximum(tokens_LG, 1), np.nan)
        wanted["idle_fraction"] = ("Tokens without an expert", "share of tokens that no expert took", 1.0)
    for name, (title, caption, top) in wanted.items():
        scale = linear_scale(f"{caption}, {steps}", top)
        yield f"moe/{name}", draw(metrics[name], layers, subject.group_axis, scale=scale, title=title)
    if subject.active_target:
        target_G = np.array([subject.active_target.get(group.name, np.nan) for group in groups])
        chosen_LG = group_metrics(sums["choices_LC"], sums["tokens_LG"], groups)["experts_per_token"]
        scale = ratio_scale(f"true experts a token over the target, {steps}")
        title = "Load over its target"
        yield "moe/load_over_target", draw(chosen_LG / target_G, layers, subject.group_axis, scale=scale, title=title)
    scale = linear_scale(f"over that of an even choice, {steps}", 1.0)
    entropy_LG = relative_entropy(sums["entropy_sum_LG"], sums["tokens_LG"], groups)
    yield "moe/relative_entropy", draw(entropy_LG, layers, subject.group_axis, scale=scale, title="Entropy of the router")


def loads(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> Iterator[tuple[ExpertGroup, np.ndarray]]:
    """For each group the load of its true experts over the layer's mean, float64 [L, n]."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        yield group, _over_mean(true_Ln)


def zero_computation_fraction(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> np.ndarray:
    """Share of each group's choices that went to identity and constant experts, float64 [L, G]; nan without choices."""
    shares = []
    for choices in group_choices(choices_LC, groups):
        free_L = choices.identity_Li.sum(1) + choices.constant_Lc.sum(1)
        shares.append(np.where(choices.total > 0, free_L / np.maximum(choices.total, 1), np.nan))
    return np.stack(shares, axis=1)


def relative_entropy(entropy_sum_LG: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup]) -> np.ndarray:
    """Mean entropy over the entropy of an even choice, float64 [L, G]: 1 if all columns are equally likely; nan without
    tokens."""
    most_G = np.array([math.log(max(group.num_columns, 2)) for group in groups])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(tokens_LG > 0, entropy_sum_LG / tokens_LG / most_G, np.nan)


def _per_group_maps(subject: Subject, metrics: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str, float]]:
    """name -> (title, caption, top of the colour scale) of the maps of layers x groups."""
    wanted: dict[str, tuple[str, str, float]] = {}
    if any(group.num_null for group in subject.groups):
        wanted["null_fraction"] = ("Null fraction", "share of choices that went to null experts", 1.0)
    if any(group.num_identity or group.num_constant for group in subject.groups):
        wanted["zero_computation_fraction"] = (
            "Free fraction",
            "share of choices that went to identity and constant experts",
            1.0,
        )
    split = tag_plan(len(subject.groups), subject.num_modalities, mixture_of_depths=subject.mixture_of_depths).by_group
    if "experts_per_token" not in split:
        largest_k = float(max(group.top_k for group in subject.groups))
        wanted["experts_per_token"] = ("Experts a token", "true experts a token took", largest_k)
    for name, title, caption in (
        ("load_imbalance", "Load imbalance", "busiest over mean expert"),
        ("capacity_used", "Capacity used", "busiest expert over an even share"),
    ):
        if name not in split:
            wanted[name] = (title, caption, float(np.nanmax(metrics[name], initial=1.0)))
    return wanted


def _over_mean(load_LX: np.ndarray) -> np.ndarray:
    mean_L1 = load_LX.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(mean_L1 > 0, load_LX / mean_L1, np.nan)
