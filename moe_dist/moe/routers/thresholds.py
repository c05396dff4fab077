"""The thresholds by which expert choice is causal in evaluation: running means of the k-th largest score, and a correction.

Expert Threshold (arXiv 2603.11535): c_i is the running mean of the k-th largest score of expert i over its selection scopes.
With q the mean of a step (sets weighted by their tokens) and w the weight of one step (1 / steps at first, then 1 - decay):

    m <- m + w (q - m)      running mean of the k-th largest score
    c = m + d               d moves only when thresholds are calibrated

A mean of quantiles is not the quantile: where the tokens of a set are alike, m lets through another share of the tokens
than the experts took, and it lags where scores drift. `moe_dist.train.evaluation.calibration` sets d so that shares are alike.

Noise is left out of all scores here, as there is none in evaluation. All ranks update alike, from sums over all ranks.
Shape letters: L MoE layers, E experts of all groups, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.moe.layer import MoELayer
from moe_dist.moe.lora import LoRALayer
from moe_dist.moe.routers.expert_choice import STATISTICS, ExpertChoiceRouter


class ThresholdUpdater:
    """Updates the thresholds of a model's routers after each step. Their state is in the routers' buffers.

    Args:
        routers: One for each MoE layer, in order.
    """

    def __init__(self, routers: Sequence[ExpertChoiceRouter]) -> None:
        self._routers = list(routers)

    @classmethod
    def of(cls, layers: Sequence[MoELayer | LoRALayer]) -> "ThresholdUpdater | None":
        """For a model's MoE layers; None where tokens choose."""
        routers = [layer.router for layer in layers if isinstance(layer.router, ExpertChoiceRouter)]
        return cls(routers) if routers else None

    @torch.no_grad()
    def __call__(self, kth_score_LE: Tensor, tokens_LG: Tensor) -> None:
        """After a step that was taken: sums over all its micro-batches and ranks. Does not sync.

        Args:
            kth_score_LE: As `ChoiceSums`.
            tokens_LG: Tokens of each group; one that had none stays as it is.
        """
        gates = [gate for router in self._routers for gate in router.gates()]
        groups, router = self._routers[0].groups, self._routers[0]
        num_layers, sizes = len(self._routers), [group.num_experts for group in groups]
        tokens_LE = tokens_LG[:, router.group_of_expert_E].to(torch.float64)
        kth_score_LE = kth_score_LE.to(torch.float64) / tokens_LE.clamp_min(1.0)
        threshold_LE = torch.cat([gate.threshold for gate in gates]).view(num_layers, -1)
        statistics_2LE = torch.cat([gate.statistics for gate in gates], dim=1).view(STATISTICS, num_layers, -1)
        new_threshold_LE, new_statistics_2LE = updated(
            threshold_LE, statistics_2LE, kth_score_LE, decay=router.threshold_decay
        )
        seen_LE = tokens_LE > 0
        threshold_LE = torch.where(seen_LE, new_threshold_LE, threshold_LE)
        statistics_2LE = torch.where(seen_LE, new_statistics_2LE, statistics_2LE)
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [each for gate in gates for each in (gate.threshold, gate.statistics)],
            [
                each
                for layer in range(num_layers)
                for both in zip(threshold_LE[layer].split(sizes), statistics_2LE[:, layer].split(sizes, dim=1), strict=True)
                for each in both
            ],
        )


def updated(threshold_n: Tensor, statistics_2n: Tensor, kth_score_n: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """Thresholds and statistics [2, ...] (mean, steps) after one step with q = `kth_score_n`; n stands for any shape."""
    mean_n, steps_n = statistics_2n
    weight_n = (1.0 / (steps_n + 1.0)).clamp_min(1.0 - decay)
    new_mean_n = mean_n + weight_n * (kth_score_n - mean_n)
    new_threshold_n = new_mean_n + (threshold_n - mean_n)
    statistics_2n = torch.stack([new_mean_n, steps_n + 1.0]).to(statistics_2n.dtype)
    return new_threshold_n.to(threshold_n.dtype), statistics_2n
