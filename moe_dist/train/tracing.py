"""Collects the choices of the tokens of a step, and hands them to the writer of this rank's trace.

Shape letters: T tokens, L MoE layers, K choices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.data.order import micro_batches
from moe_dist.moe.routing import LayerReport
from moe_dist.monitor.trace.format import MANIFEST, TOKEN, Manifest
from moe_dist.monitor.trace.writer import TraceWriter
from moe_dist.plan.preflight import Preflight
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder


class StepWatcher(Protocol):
    """Sees the choices of every token of the steps that are due."""

    def due(self, number: int) -> bool:
        """Whether it watches step `number` (0-based)."""
        ...

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        """Takes a micro-batch of the step."""
        ...

    def finish(self, number: int) -> None:
        """Is called at the end of the step."""
        ...

    def flush(self) -> None:
        """Makes all steps so far durable, before a checkpoint."""
        ...


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
            rows = (~batch.padding_BS).flatten().nonzero().flatten()[:left]  # only these rows leave the device
            left = None if left is None else left - len(rows)
            tokens = np.empty(len(rows), TOKEN)
            row, tokens["position"] = np.divmod(_host(rows), batch.tokens_BS.shape[1])
            tokens["sequence"] = numbers.start + row
            tokens["token"], tokens["modality"] = (_host(x.flatten()[rows]) for x in (batch.tokens_BS, batch.modality_BS))
            found.append((tokens, _host(ids_TLK[rows]), _host(weights_TLK[rows]) if self._weights else None))
        self._parts.clear()
        tokens, ids, weights = ([part[i] for part in found] for i in range(3))
        self._writer.add(
            number + 1, np.concatenate(tokens), np.concatenate(ids), np.concatenate(weights) if self._weights else None
        )

    def flush(self) -> None:
        """Waits until all traced steps are on disk."""
        self._writer.flush()


@contextmanager
def traced_steps(
    plan: Preflight, folder: RunFolder, env: RankEnv, *, attempt_id: str, step: int, position: int
) -> Iterator[StepTracer | None]:
    """Yields this rank's tracer of the attempt; None without `monitor.trace`. Rank 0 writes the manifest before the first
    step.

    Args:
        step, position: Steps before the attempt, and position of its first step in the stream of sequences (`Progress`).
    """
    config, section = plan.config, plan.config.monitor.trace
    if section is None:
        yield None
        return
    place = folder.trace / f"from_step_{step}_{attempt_id}"
    place.mkdir(parents=True, exist_ok=True)
    if env.rank == 0:
        manifest = Manifest(
            attempt=1 + len(list(folder.trace.glob(f"*/{MANIFEST}"))),
            from_step=step,
            ranks=env.world_size,
            layers=config.model.moe_layers,
            choices=max(group.top_k for group in plan.placement.groups),
            weights=section.weights,
            groups=plan.placement.groups,
            rank_of_expert=plan.placement.rank_of_expert,
            modalities=tuple(plan.manifest.modalities),
            every=section.every,
            tokens=section.tokens,
            tokenizer=plan.manifest.tokenizer,
            configuration=config.model_dump(mode="json"),
        )
        write_atomically(place / MANIFEST, manifest.to_json())
    writer = TraceWriter(place, env.rank, weights=section.weights)
    share = {"micro_batch": config.train.micro_batch, "rank": env.rank, "world_size": env.world_size}
    batch = config.train.global_batch

    def sequences(number: int) -> list[range]:
        return micro_batches(position + (number - step) * batch, global_batch=batch, **share)

    try:
        yield StepTracer(writer, every=section.every, tokens=section.tokens, weights=section.weights, sequences=sequences)
    finally:
        writer.close()


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
