"""LoRA (arXiv 2106.09685) on the shared expert of an MoE layer: W' x = W x + (alpha / r) B A x, where W is frozen."""

from torch import Tensor

from moe_dist.model.layers import Projection, SwiGLU
from moe_dist.moe.experts.lora import PROJECTIONS, Adapter


class AdaptedProjection(Projection):
    """A projection without bias, and its adapter."""

    def __init__(self, in_dim: int, out_dim: int, *, rank: int, alpha: float) -> None:
        super().__init__(in_dim, out_dim)
        self.adapter, self._scale = Adapter(in_dim, out_dim, rank), alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self._scale * self.adapter(x)


def adapted(ffn: SwiGLU, *, rank: int, alpha: float) -> SwiGLU:
    """Adds adapters to gate, up and down of a new FFN in place. Returns the FFN."""
    for name in PROJECTIONS:
        out_dim, in_dim = ffn.get_submodule(name).get_parameter("weight").shape
        setattr(ffn, name, AdaptedProjection(in_dim, out_dim, rank=rank, alpha=alpha))
    return ffn
