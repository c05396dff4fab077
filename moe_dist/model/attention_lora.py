"""LoRA adapters (arXiv 2106.09685) of an attention module: W' x = W x + (alpha / r) B A x, where W is frozen.

Shape letters: I inputs and O outputs of a projection, r rank.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from moe_dist.moe.experts.lora import Adapter, adapter_draw
from moe_dist.moe.routing.draws import dropped
from moe_dist.moe.routing.types import GlobalBatchInfo

PROJECTIONS = ("q", "k", "v", "o", "q_down", "q_up", "kv_down", "kv_up")


class AttentionLoRA(nn.Module):
    """The LoRA adapters of one attention module.

    Args:
        widths: I and O of each projection that gets an adapter.
        rank, alpha: r and alpha; the scale is alpha / r.
        dropout: Fraction of the elements of an adapter's input that dropout sets to 0 in training.
        seed, layer: Dropout's random numbers depend on these, and on the step and the index of the first token.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout, self.seed, self.layer = alpha / rank, dropout, seed, layer
        for target, (inputs, outputs) in widths.items():
            self.add_module(target, Adapter(inputs, outputs, rank))

    def forward(self, target: str, x: Tensor, y: Tensor, batch_info: GlobalBatchInfo | None) -> Tensor:
        """Returns y + (alpha / r) B A x, with A and B of the projection `target`. Returns y if `target` has no adapter."""
        if target not in self._modules:
            return y
        if self.training and self.dropout:
            assert batch_info is not None, "dropout needs the step and the tokens' numbers, which come with the micro-batch"
            draw = adapter_draw(self.seed, self.layer, batch_info)
            # Names end in negative numbers, because 0, 1 and 2 stand for projections of LoRA experts in the same layer.
            x = dropped(x, self.dropout, name=(*draw, -1 - PROJECTIONS.index(target)))
        return y + self.scale * self.get_submodule(target)(x)
