"""Draws a run's heat maps. Each map shows sums over all steps since the previous map, because a single step is noisy.

Shape letters are as in `metrics.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_dist.monitor.heatmaps import Axis, draw, linear_scale, ratio_scale
from moe_dist.monitor.metrics import divide, group_choices, group_metrics
from moe_dist.monitor.tags import tag_plan
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@dataclass(frozen=True)
class Subject:
    """The run that the pictures show.

    Attributes:
        groups: Expert groups, in the order of the columns of `Record.arrays`.
        num_modalities: Number of modalities of the data. It determines which scalars are split by group.
        mixture_of_depths: True if some layers compute only a fraction of the tokens.
    """

    groups: tuple[ExpertGroup, ...]
    placement: ExpertPlacement
    moe_layers: tuple[int, ...]
    num_modalities: int
    mixture_of_depths: bool = False

    def expert_axis(self, group: ExpertGroup) -> Axis:
        ranks = [self.placement.rank_of_expert[expert] for expert in group.experts]
        word = "rank " if len(ranks) <= 16 else "r"  # a narrow column has no space for "rank"
        labels = [str(expert) for expert in range(len(ranks))]
        return Axis("expert, and the rank that holds it", labels, [f"{word}{rank}" for rank in ranks])


def heat_maps(sums: Mapping[str, np.ndarray], subject: Subject, steps: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each heat map as (tag, picture). Its rows are layers; its columns are experts, ranks or groups.

    No tag may equal the tag of a scalar, because TensorBoard shows only one type of value under a tag.
    """
    groups = subject.groups
    layers = Axis("layer", [str(layer) for layer in subject.moe_layers])
    by_group = Axis("group", [group.name for group in groups])
    for group, load_Ln in loads(sums["choices_LC"], groups):
        scale = ratio_scale(f"choices over the mean expert's, {steps}")
        title = f"Load of the {group.name} experts"
        yield f"moe/load/{group.name}", draw(load_Ln, layers, subject.expert_axis(group), scale=scale, title=title)
    if subject.placement.num_ranks > 1:
        rows_LR = sums["weighted_rows_LR"]
        ranks = Axis("rank of the EP group", [str(rank) for rank in range(rows_LR.shape[1])])
        scale = ratio_scale(f"rows x FFN width over the mean rank's, {steps}")
        yield "moe/rank_load", draw(over_mean(rows_LR), layers, ranks, scale=scale, title="Load of the ranks")
    for name, values_LG, top, title, caption in _per_group_maps(sums, subject):
        scale = linear_scale(f"{caption}, {steps}", top)
        yield f"moe/{name}", draw(values_LG, layers, by_group, scale=scale, title=title)
    if "aimed_LG" in sums:  # mean over tokens, because the target may differ between steps
        target_LG = divide(sums["aimed_LG"], sums["tokens_LG"])
        chosen_LG = group_metrics(sums["choices_LC"], sums["tokens_LG"], groups)["experts_per_token"]
        scale = ratio_scale(f"true experts per token over the target, {steps}")
        yield (
            "moe/load_over_target",
            draw(chosen_LG / target_LG, layers, by_group, scale=scale, title="Load over its target"),
        )
    scale = linear_scale(f"entropy over the entropy of equal probabilities, {steps}", 1.0)
    entropy_LG = relative_entropy(sums["entropy_sum_LG"], sums["tokens_LG"], groups)
    yield "moe/relative_entropy", draw(entropy_LG, layers, by_group, scale=scale, title="Entropy of the router")


def change_map(choices_LC: np.ndarray, subject: Subject, after: ExpertPlacement, steps: str) -> np.ndarray:
    """Draws the effect of a lever of `rank_balance`: each rank's load divided by a rank's mean load, with the same choices
    but two placements, that of `subject` and the placement `after`."""
    load_LE = choices_LC[:, : after.num_experts] * np.array(after.width_of_expert)
    values = np.concatenate([over_mean(each.by_rank(load_LE)) for each in (subject.placement, after)], axis=1)
    ranks, layers = [str(rank) for rank in range(after.num_ranks)], [str(layer) for layer in subject.moe_layers]
    when = ["before"] * len(ranks) + ["after"] * len(ranks)
    scale = ratio_scale(f"rows x FFN width over the mean rank's, {steps}")
    columns = Axis("rank of the EP group, before and after", ranks * 2, when)
    return draw(values, Axis("layer", layers), columns, scale=scale, title="Load of the ranks before and after a change")


def loads(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> Iterator[tuple[ExpertGroup, np.ndarray]]:
    """Yields each group with its true experts' numbers of choices divided by their mean, float64 [L, n]."""
    for group, (true_Ln, *_) in zip(groups, group_choices(choices_LC, groups), strict=True):
        yield group, over_mean(true_Ln)


def zero_computation_fraction(choices_LC: np.ndarray, groups: Sequence[ExpertGroup]) -> np.ndarray:
    """Returns the fraction of choices that go to identity or constant experts, float64 [L, G]; nan without choices."""
    split = group_choices(choices_LC, groups)
    return np.stack([divide(c.identity_Li.sum(1) + c.constant_Lc.sum(1), c.total) for c in split], axis=1)


def relative_entropy(entropy_sum_LG: np.ndarray, tokens_LG: np.ndarray, groups: Sequence[ExpertGroup]) -> np.ndarray:
    """Returns the router's mean entropy over tokens / largest possible entropy, float64 [L, G]; nan without tokens."""
    largest_G = np.array([math.log(max(group.num_columns, 2)) for group in groups])  # avoids the divisor log 1 = 0
    return divide(entropy_sum_LG, tokens_LG) / largest_G


def _per_group_maps(sums: Mapping[str, np.ndarray], subject: Subject) -> Iterator[tuple[str, np.ndarray, float, str, str]]:
    """Yields (name, values [L, G], top of the colour scale, title, caption) for each map of layers x groups. A family of
    scalars gets such a map if it is not split by group."""
    groups, tokens_LG = subject.groups, sums["tokens_LG"]
    metrics = group_metrics(sums["choices_LC"], tokens_LG, groups, dropped_LG=sums["dropped_LG"])
    split = tag_plan(len(groups), subject.num_modalities, mixture_of_depths=subject.mixture_of_depths).by_group
    if any(group.num_null for group in groups):
        yield "null_fraction", metrics["null_fraction"], 1.0, "Null fraction", "share of choices that went to null experts"
    if any(group.num_identity or group.num_constant for group in groups):
        share_LG = zero_computation_fraction(sums["choices_LC"], groups)
        caption = "share of choices that went to identity and constant experts"
        yield "zero_computation_fraction", share_LG, 1.0, "Zero-computation fraction", caption
    for name, title, caption in (
        ("experts_per_token", "Experts per token", "true experts per token"),
        ("load_imbalance", "Load imbalance", "busiest over mean expert"),
        ("capacity_used", "Capacity used", "busiest expert over an even share"),
    ):
        if name not in split:
            # If experts choose tokens, a token may have more than top_k experts.
            least = max(group.top_k for group in groups) if name == "experts_per_token" else 1
            yield name, metrics[name], float(np.nanmax(metrics[name], initial=least)), title, caption
    if sums["dropped_LG"].any():
        pairs_LG = np.stack([choices.true_Ln.sum(1) for choices in group_choices(sums["choices_LC"], groups)], axis=1)
        share_LG = divide(sums["dropped_LG"], pairs_LG)
        caption = "share of (token, expert) pairs that a capacity dropped"
        yield "dropped_fraction", share_LG, max(0.1, float(np.nanmax(share_LG))), "Dropped pairs", caption
    if "idle_LG" in sums:
        caption = "share of tokens that no expert took"
        yield "idle_fraction", divide(sums["idle_LG"], tokens_LG), 1.0, "Tokens without an expert", caption


def over_mean(load_LX: np.ndarray) -> np.ndarray:
    """Returns each column's load divided by the mean load of its layer, float64 [L, X]; nan for a layer without load."""
    return divide(load_LX, load_LX.mean(1, keepdims=True))
