"""Updates the thresholds by which evaluation selects tokens causally (Expert Threshold, arXiv 2603.11535).

A chooser is an expert (expert choice) or a layer (mixture of depths). The threshold c of a chooser is m + d. m is the
running mean of the chooser's k-th largest score in a selection scope, and d is a correction. q is the mean of the k-th
largest score over all selection scopes of one step, weighted by their numbers of tokens. w is the weight of this step in
the running mean: at first 1 / (number of steps), later 1 - decay.

    m <- m + w (q - m)      running mean of the k-th largest score
    c = m + d               only a calibration of the thresholds changes d

With d = 0 evaluation might admit more or fewer tokens than training, for example because m lags behind drifting scores.
`moe_dist.train.evaluation.evaluator` sets d so that evaluation and training admit the same fraction of tokens.

These scores contain no noise, because evaluation adds no noise. All ranks get the same thresholds, because q is computed
from sums over all ranks. Shape letters: L layers, E choosers of a layer, G groups, n choosers of one gate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.moe.experts.lora import LoRALayer
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.selection import ChoosingRouter, ThresholdGate
from moe_dist.moe.routing.counts import RoutingCounts


class ThresholdUpdater:
    """Updates the thresholds, which are buffers of the routers, after each step.

    Args:
        gates_LG: The gate of each layer and group.
        decay: Decay of the running means per step.
        dtype: Dtype of the arithmetic; None for the dtype of the buffers.
        mixture_of_depths: True if the gates belong to mixture-of-depths layers, not to experts.
    """

    def __init__(
        self,
        gates_LG: Sequence[Sequence[ThresholdGate]],
        decay: float,
        *,
        dtype: torch.dtype | None = None,
        mixture_of_depths: bool = False,
    ) -> None:
        self._gates_LG, self._decay, self._dtype = gates_LG, decay, dtype
        self._mixture_of_depths = mixture_of_depths

    @classmethod
    def of(cls, layers: Sequence[MoELayer | LoRALayer]) -> "ThresholdUpdater | None":
        """Makes the updater for a model's MoE layers. Returns None if tokens choose experts."""
        routers = [layer.router for layer in layers if isinstance(layer.router, ChoosingRouter)]
        if not routers:
            return None
        return cls([router.gates() for router in routers], routers[0].threshold_decay, dtype=torch.float64)

    @torch.no_grad()
    def after_step(self, counts: RoutingCounts[Tensor]) -> None:
        """Updates the thresholds from a step's counts over all ranks. Does not change the thresholds of a group without
        tokens. Call this method only if the optimizer did not skip the step. Does not sync."""
        kth_score_LE, tokens_LG = counts.kth_score_LE, counts.tokens_LG
        if self._mixture_of_depths:
            assert counts.depth is not None, "mixture-of-depths layers count"
            kth_score_LE, tokens_LG = counts.depth.kth_score_P, counts.depth.tokens_P
        assert kth_score_LE is not None, "routers with thresholds count scores"
        num_layers, buffers = len(self._gates_LG), [gate.running_mean() for gates in self._gates_LG for gate in gates]
        sizes = [len(threshold_n) for threshold_n, _, _ in buffers]
        tokens_E = tokens_LG.to(torch.float64).flatten()  # one number per gate; the next line repeats it per chooser
        tokens_E = torch.cat([one.expand(size) for one, size in zip(tokens_E.split(1), sizes, strict=True)])
        threshold_E, mean_E, steps_E = (torch.cat(parts) for parts in zip(*buffers, strict=True))
        kth_score_E = kth_score_LE.to(torch.float64).reshape(num_layers, -1).flatten() / tokens_E.clamp_min(1.0)
        news = updated(threshold_E, mean_E, steps_E, kth_score_E.to(self._dtype or mean_E.dtype), decay=self._decay)
        seen_E = tokens_E > 0
        kept = [torch.where(seen_E, new, old) for new, old in zip(news, (threshold_E, mean_E, steps_E), strict=True)]
        torch._foreach_copy_(  # one kernel for all buffers  # pyright: ignore[reportPrivateImportUsage]
            [buffer for three in buffers for buffer in three],
            [new for three in zip(*(each.split(sizes) for each in kept), strict=True) for new in three],
        )


def updated(
    threshold_n: Tensor, mean_n: Tensor, steps_n: Tensor, kth_score_n: Tensor, *, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the new threshold, running mean and number of steps, after a step with q = `kth_score_n`."""
    weight_n = (1.0 / (steps_n + 1.0)).clamp_min(1.0 - decay)
    new_mean_n = mean_n + weight_n * (kth_score_n - mean_n)
    new_threshold_n = new_mean_n + (threshold_n - mean_n)  # keeps the correction d
    return new_threshold_n.to(threshold_n.dtype), new_mean_n.to(mean_n.dtype), steps_n + 1.0
