"""Shows how the sequences of a step are dealt to the ranks (`moe_dist.data.dealing`)."""

from moe_dist.data.loader import TrainLoader
from moe_dist.monitor.statistics import LeverDecision
from moe_dist.train.step.result import StepResult

SHOW_EVERY = 100  # steps


class DealingLever:
    """See `moe_dist.train.rank_balance.levers.Lever`. The loader itself deals the sequences of each step, and
    keeps the order of the stream if no other deal is more even. The lever shows the loader's decision in the
    first and every `SHOW_EVERY`-th step."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def after_step(self, result: StepResult, *, step: int, position: int) -> LeverDecision | None:
        """See `Lever`."""
        if step != 1 and step % SHOW_EVERY:
            return None
        deal = self._loader.dealt(position)
        taken = deal.dealt < deal.undealt
        why = "it pays at once, because the batch alone decides" if taken else "no deal is better than the stream's order"
        return LeverDecision("dealing", taken, before=deal.undealt, after=deal.dealt, cost_steps=0.0, why=why)
