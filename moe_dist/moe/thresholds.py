"""The thresholds by which expert choice is causal in evaluation: running means, corrected so that the load is kept.

Expert Threshold (arXiv 2603.11535): c_i is the running mean of the k-th largest score of expert i over its choice sets. A
mean of quantiles is not the quantile of the mean: where the tokens of a set are alike, it lets through another share of the
tokens than the experts took. So a correction follows the share itself. After each step, with q the mean k-th largest score
(sets weighted by their tokens), a the share of the tokens whose score lies above c, t the share that the experts took, and
w the weight of one step (1 / steps at first, then 1 - decay):

    m <- m + w (q - m)              running mean of the k-th largest score
    u <- u + w (|q - c| - u),  v <- v + w (|a - t| - v)      u / v: how far the score moves for a share
    d <- d + w (a - t) u / v        in steady state the mean of a is that of t
    c <- m + d

Noise is left out of all scores here, as there is none in evaluation. All ranks update alike, from sums over all ranks.
Shape letters: L MoE layers, E experts of all groups, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.expert_choice import STATISTICS, ExpertChoiceRouter


class ThresholdKeeper:
    """Updates the thresholds of a model's routers after each step. Their state is in the routers' buffers.

    Args:
        routers: One for each MoE layer, in order.
    """

    def __init__(self, routers: Sequence[ExpertChoiceRouter]) -> None:
        self._routers = list(routers)

    @classmethod
    def of(cls, layers: Sequence[MoELayer]) -> "ThresholdKeeper | None":
        """For a model's MoE layers; None where tokens choose."""
        routers = [layer.router for layer in layers if isinstance(layer.router, ExpertChoiceRouter)]
        return cls(routers) if routers else None

    @torch.no_grad()
    def __call__(self, cut_LE: Tensor, above_LE: Tensor, taken_LE: Tensor, tokens_LG: Tensor) -> None:
        """After a step that was taken: sums over all its micro-batches and ranks. Does not sync.

        Args:
            cut_LE, above_LE: As `ChoiceSums`.
            taken_LE: Tokens that each expert took.
            tokens_LG: Tokens of each group.
        """
        gates = [gate for router in self._routers for gate in router.gates()]
        groups, router = self._routers[0].groups, self._routers[0]
        num_layers, sizes = len(self._routers), [group.num_experts for group in groups]
        tokens_LE = tokens_LG[:, router.group_of_expert_E].to(torch.float64)
        shares = [each.to(torch.float64) / tokens_LE.clamp_min(1.0) for each in (cut_LE, above_LE, taken_LE)]
        threshold_LE = torch.cat([gate.threshold for gate in gates]).view(num_layers, -1)
        statistics_4LE = torch.cat([gate.statistics for gate in gates], dim=1).view(STATISTICS, num_layers, -1)
        new_threshold_LE, new_statistics_4LE = updated(threshold_LE, statistics_4LE, *shares, decay=router.threshold_decay)
        seen_LE = tokens_LE > 0
        threshold_LE = torch.where(seen_LE, new_threshold_LE, threshold_LE)
        statistics_4LE = torch.where(seen_LE, new_statistics_4LE, statistics_4LE)
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [each for gate in gates for each in (gate.threshold, gate.statistics)],
            [
                each
                for layer in range(num_layers)
                for both in zip(threshold_LE[layer].split(sizes), statistics_4LE[:, layer].split(sizes, dim=1), strict=True)
                for each in both
            ],
        )


def updated(
    threshold_n: Tensor, statistics_4n: Tensor, cut_n: Tensor, above_n: Tensor, taken_n: Tensor, *, decay: float
) -> tuple[Tensor, Tensor]:
    """Thresholds and statistics [4, ...] after one step, as the module says; n stands for any shape.

    Args:
        cut_n: q.
        above_n, taken_n: a and t, as shares of the group's tokens.
    """
    mean_n, score_n, share_n, steps_n = statistics_4n
    first_n = steps_n == 0
    weight_n = (1.0 / (steps_n + 1.0)).clamp_min(1.0 - decay)
    error_n = above_n - taken_n
    correction_n = threshold_n - mean_n
    new_mean_n = mean_n + weight_n * (cut_n - mean_n)
    score_n = score_n + weight_n * ((cut_n - threshold_n).abs() - score_n)
    share_n = share_n + weight_n * (error_n.abs() - share_n)
    slope_n = torch.where(share_n > 0, score_n / share_n.clamp_min(1e-12), 0.0)
    correction_n = correction_n + weight_n * error_n * slope_n
    # The first step knows no threshold to compare with.
    score_n, share_n = torch.where(first_n, 0.0, score_n), torch.where(first_n, 0.0, share_n)
    new_threshold_n = torch.where(first_n, cut_n, new_mean_n + correction_n)
    statistics_4n = torch.stack([new_mean_n, score_n, share_n, steps_n + 1.0]).to(statistics_4n.dtype)
    return new_threshold_n.to(threshold_n.dtype), statistics_4n
