"""Computes the scalars of a held-out evaluation."""

from collections.abc import Sequence

from moe_dist.monitor.metrics import depth_metrics, ratio, reduce_known
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.monitor.tags import tag_plan


def evaluation_scalars(result: EvaluationResult, modalities: Sequence[str], num_groups: int) -> dict[str, float | None]:
    """Returns the scalars of a held-out evaluation: eval/..., the measured balance efficiencies, and
    mixture_of_depths/load_over_target, which is a mean over the mixture-of-depths layers.

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
