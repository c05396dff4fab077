"""Collects the choices of the tokens of a step, and hands them to the writer of this rank's trace.

Shape letters: T tokens, L MoE layers, K choices.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.moe.routing import LayerReport
from moe_dist.monitor.trace.format import TOKEN
from moe_dist.monitor.trace.writer import TraceWriter


class StepTracer:
    """Traces every `every`-th step, beginning with step 1.

    Args:
        tokens: Largest number of tokens of a step; None for all.
        weights: Whether the weights are written.
        sequences: Gives for a step (0-based) the numbers of the sequences of each of this rank's micro-batches.
    """

    def __init__(
        self,
        writer: TraceWriter,
        *,
        every: int,
        tokens: int | None,
        weights: bool,
        sequences: Callable[[int], Sequence[range]],
    ) -> None:
        self._writer, self._every, self._tokens, self._weights = writer, every, tokens, weights
        self._sequences = sequences
        self._parts: list[tuple[Batch, Tensor, Tensor]] = []  # of each micro-batch: batch, ids and weights [T, L, K]

    def due(self, number: int) -> bool:
        """Whether step `number` (0-based) is traced."""
        return number % self._every == 0

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        """Takes a micro-batch. Tensors stay on the device until `finish`: 4 bytes a token, layer and choice."""
        chosen = [report.chosen for report in reports if report.chosen is not None]
        ids_TLK = torch.stack([each.column_TK for each in chosen], dim=1)
        self._parts.append((batch, ids_TLK, torch.stack([each.weight_TK for each in chosen], dim=1)))

    def finish(self, number: int) -> None:
        """Copies the choices of step `number` (0-based) to the host, a sync after the step's last one, and writes them."""
        left, found = self._tokens, []
        for numbers, (batch, ids_TLK, weights_TLK) in zip(self._sequences(number), self._parts, strict=True):
            real_T = ~_host(batch.padding_BS).ravel()
            rows = np.flatnonzero(real_T)[:left]
            left = None if left is None else left - len(rows)
            length = batch.tokens_BS.shape[1]
            tokens = np.empty(len(rows), TOKEN)
            tokens["sequence"], tokens["position"] = numbers.start + rows // length, rows % length
            tokens["token"], tokens["modality"] = (_host(x).ravel()[rows] for x in (batch.tokens_BS, batch.modality_BS))
            found.append((tokens, _host(ids_TLK)[rows], _host(weights_TLK)[rows] if self._weights else None))
        self._parts.clear()
        tokens, ids, weights = ([part[i] for part in found] for i in range(3))
        self._writer.add(
            number + 1, np.concatenate(tokens), np.concatenate(ids), np.concatenate(weights) if self._weights else None
        )

    def flush(self) -> None:
        """Waits until all traced steps are on disk."""
        self._writer.flush()


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
