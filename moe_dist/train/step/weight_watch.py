"""Measures weight, update and gradient of each trained tensor, and the experts' outputs, in some steps.

Cost of such a step: this rank reads at most `SAMPLE` elements of each of its tensors four times, without a copy of whole
weights. One all-reduce of 19 numbers for each logical tensor and one host sync follow. An expert is a tensor of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from moe_dist.checkpoint.state import LocalShard
from moe_dist.comm.collectives import pack, sum_over, unpack
from moe_dist.comm.names import WEIGHT_SUMS
from moe_dist.monitor.statistics import WeightTable
from moe_dist.optim.optimizer import local
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.step.output_watch import OutputWatch

SAMPLE, SKETCH = 256, 16


class WeightWatch:
    """Measures around the update of a step.

    Args:
        read: Returns this rank's parts of the trained tensors (or of their gradients, given True) by logical name, and the
            names of the trained tensors of all ranks.
        outputs: Measures the experts' outputs.
    """

    def __init__(
        self, read: Callable[[bool], tuple[Mapping[str, LocalShard], Sequence[str]]], mesh: Mesh, outputs: OutputWatch
    ) -> None:
        self._read, self._mesh, self._outputs, self.around_step = read, mesh, outputs, outputs.around_step
        self._places: dict[int, Tensor] = {}  # number of elements -> evenly spaced indices
        self._table: WeightTable | None = None

    def take(self) -> WeightTable | None:
        """Returns the step's table once, and then forgets it. Returns None if the step was not measured or was skipped."""
        table, self._table = self._table, None
        return table

    @contextmanager
    @torch.no_grad()
    def around_update(self) -> Iterator[None]:
        """Is entered after gradients are summed but before any rank clips them, and left after the update. Collective."""
        held, names = self._read(False)
        kept = [name for name, each in held.items() if local(each.tensor).numel()]
        before_NS, gradient_NS = self._samples(held, kept), self._samples(self._read(True)[0], kept)
        yield
        held, _ = self._read(False)  # read again, because an engine may return copies
        after_NS, index = self._samples(held, kept), {name: i for i, name in enumerate(names)}
        sums_NX = torch.zeros(len(names), 3 + SKETCH, dtype=torch.float64, device=self._mesh.device)
        if kept:
            sizes = [[local(held[name].tensor).numel() / SAMPLE, held[name].copies] for name in kept]
            elements_N1, copies_N1 = torch.tensor(sizes, dtype=torch.float64, device=sums_NX.device).split(1, dim=1)
            measured = (after_NS, after_NS - before_NS, gradient_NS)
            squares_N3 = torch.stack([each.double().square().sum(1) for each in measured], dim=1) * elements_N1
            sketch_NX = after_NS[:, :: SAMPLE // SKETCH].double()
            place_N = torch.tensor([index[name] for name in kept], device=sums_NX.device)
            sums_NX[place_N] = torch.cat([squares_N3, sketch_NX], dim=1) / copies_N1
        measured = (sums_NX, self._outputs.sums_LE2)
        flat = sum_over(pack(measured), self._mesh.world, name=WEIGHT_SUMS, tracker=self._mesh.tracker)
        sums, outputs_LE2 = unpack(flat.cpu().numpy(), measured)
        self._table = WeightTable(tuple(names), *np.split(sums, [3], axis=1), outputs_LE2=outputs_LE2)

    def _samples(self, held: Mapping[str, LocalShard], names: Sequence[str]) -> Tensor:
        """Returns evenly spaced elements of each named tensor, fp32 [N, SAMPLE]; zeros for a tensor that is missing."""
        rows = [self._sample(local(held[name].tensor).reshape(-1)) if name in held else None for name in names]
        zero = torch.zeros(SAMPLE, device=self._mesh.device)
        return torch.stack([zero if row is None else row for row in rows]) if rows else zero[None, :][:0]

    def _sample(self, flat: Tensor) -> Tensor:
        size = flat.numel()
        if size not in self._places:
            self._places[size] = torch.linspace(0, size - 1, SAMPLE, dtype=torch.float64).long().to(flat.device)
        return flat[self._places[size]].float().to(self._mesh.device)
