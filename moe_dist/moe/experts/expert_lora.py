"""LoRA adapters (arXiv 2106.09685) on the matrices of a frozen base model's experts. They have the form of PEFT's
`target_parameters`.

    [gate; up]' x = [gate; up] x + (alpha / r) B A x        A [r, D], B [2 F, r]
    down' h       = down h       + (alpha / r) B A h        A [r, F], B [D, r]

Either each expert has separate A and B on the expert's rank, or all experts of a group share one A and one B, which every
rank has. Backward does not compute gradients of frozen matrices.

Shape letters: Q (token, expert) pairs computed on this rank, D hidden size, F hidden width, r rank, I inputs and O outputs
of a matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moe_dist.moe.experts.lora import Adapter
from moe_dist.moe.experts.products import Product

TARGETS = ("gate_up", "down")


@dataclass(frozen=True)
class ExpertLoRA:
    """The adapters of a stack of experts. Separate adapters are stacked in the parameters `<target>_a` [e, r, I] and
    `<target>_b` [e, O, r]. A shared adapter has the parameters `adapters.<target>.a` [r, I] and `.b` [O, r]."""

    rank: int
    alpha: float
    targets: Sequence[str] = TARGETS
    shared: bool = False

    def _widths(self, hidden_dim: int, ffn_dim: int) -> dict[str, tuple[int, int]]:
        widths = {"gate_up": (hidden_dim, 2 * ffn_dim), "down": (ffn_dim, hidden_dim)}
        return {target: widths[target] for target in self.targets}

    def stacked(self, hidden_dim: int, ffn_dim: int) -> dict[str, tuple[int, int]]:
        """Returns the shapes of an expert's adapter matrices by name. Returns no shapes if the adapters are shared."""
        shapes = {}
        for target, (inputs, outputs) in self._widths(hidden_dim, ffn_dim).items() if not self.shared else ():
            shapes |= {f"{target}_a": (self.rank, inputs), f"{target}_b": (outputs, self.rank)}
        return shapes

    def modules(self, hidden_dim: int, ffn_dim: int) -> nn.ModuleDict | None:
        """Returns the shared adapters by target, or None if each expert has separate adapters."""
        widths = self._widths(hidden_dim, ffn_dim)
        return nn.ModuleDict({each: Adapter(*widths[each], self.rank) for each in widths}) if self.shared else None

    def delta(
        self,
        target: str,
        x_QI: Tensor,
        weights: Mapping[str, Tensor],
        product: Product,
        shared: nn.ModuleDict | None,
    ) -> Tensor:
        """Returns the scaled output of the target's adapter, [Q, O]."""
        if shared is not None:
            return self.alpha / self.rank * shared[target](x_QI)
        return self.alpha / self.rank * product(product(x_QI, weights[f"{target}_a"]), weights[f"{target}_b"])
