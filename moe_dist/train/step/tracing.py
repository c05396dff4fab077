"""Collects the expert choices of a step's tokens, and passes them to the writer of this rank's trace.

Shape letters: T tokens, L MoE layers, K choices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.config.schema import Config
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.data.loader import heldout_batches
from moe_dist.data.order import micro_batches
from moe_dist.errors import MoeDistError
from moe_dist.formats.manifest import Manifest as DataManifest
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import LayerReport, RoutingRequest
from moe_dist.monitor.trace.format import MANIFEST, TOKEN, Manifest
from moe_dist.monitor.trace.writer import TraceWriter
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas
from moe_dist.plan.preflight import Preflight
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.train.objective.loss import forward


class StepWatcher:
    """Gets the expert choices of every token in those steps for which `due` returns True. The methods `finish`, `flush` and
    `follow` do nothing by default.

    Attributes:
        own_tokens: Matters only if several ranks share sequences. If True, each of these ranks gets the tokens that it
            routes, in its own layers. If False, one of these ranks gets all tokens in all layers.
    """

    own_tokens: bool

    def due(self, number: int) -> bool:
        """Returns whether step `number` (0-based) is to be watched."""
        raise NotImplementedError

    def add(self, batch: Batch, reports: Sequence[LayerReport]) -> None:
        """Is called for each micro-batch of the step."""
        raise NotImplementedError

    def finish(self, number: int) -> None:
        """Is called at the end of the step."""

    def flush(self) -> None:
        """Is called before a checkpoint is saved. Returns when the data of all finished steps are on disk."""

    def follow(self, placement: ExpertPlacement, step: int) -> None:
        """Is called after step `step` (1-based) if experts moved or replicas changed. `placement` is the new placement."""


class StepTracer(StepWatcher):
    """Traces every `every`-th step. The first traced step is step 1.

    Args:
        tokens: Largest number of tokens that this rank writes per step; None to write all tokens.
        weights: Whether to write the router weights of the chosen experts, too.
        sequences: Maps a step (0-based) to the numbers of the sequences in each of this rank's micro-batches.
        begin: Opens the files for a new part of the trace, given the part's placement and the number of steps before it.
    """

    own_tokens = False

    def __init__(
        self,
        writer: TraceWriter,
        *,
        every: int,
        tokens: int | None,
        weights: bool,
        sequences: Callable[[int], Sequence[Sequence[int]]],
        begin: Callable[[ExpertPlacement, int], TraceWriter] | None = None,
    ) -> None:
        self._writer, self._every, self._tokens, self._weights = writer, every, tokens, weights
        self._sequences, self._begin = sequences, begin
        self._parts: list[tuple[Batch, Tensor, Tensor, Tensor | None]] = []  # batch, ids, weights [T, L, K], losses

    def due(self, number: int) -> bool:
        return number % self._every == 0

    def add(self, batch: Batch, reports: Sequence[LayerReport], losses_BS: Tensor | None = None) -> None:
        """Keeps a micro-batch's choices on the device until `finish`: 4 bytes for each token, layer and choice."""
        chosen = [report.chosen for report in reports if report.chosen is not None]
        ids_TLK = torch.stack([each.column_TK for each in chosen], dim=1)
        if losses_BS is not None:
            losses_BS = losses_BS.masked_fill(batch.labels_BS == IGNORED, math.nan).to(torch.float16)
        self._parts.append((batch, ids_TLK, torch.stack([each.weight_TK for each in chosen], dim=1), losses_BS))

    def finish(self, number: int) -> None:
        """Copies the choices of step `number` (0-based) to the host and writes them. Costs one more host sync."""
        left, found = self._tokens, []
        for numbers, (batch, ids_TLK, weights_TLK, losses_BS) in zip(self._sequences(number), self._parts, strict=True):
            rows = (~batch.padding_BS).flatten().nonzero().flatten()[:left]  # only these tokens leave the device
            left = None if left is None else left - len(rows)
            tokens = np.empty(len(rows), TOKEN)
            row, tokens["position"] = np.divmod(_host(rows), batch.tokens_BS.shape[1])
            tokens["sequence"] = np.asarray(numbers)[row]
            tokens["token"], tokens["modality"] = (_host(x.flatten()[rows]) for x in (batch.tokens_BS, batch.modality_BS))
            weights = _host(weights_TLK[rows]) if self._weights else None
            losses = None if losses_BS is None else _host(losses_BS.flatten()[rows])
            found.append((tokens, _host(ids_TLK[rows]), weights, losses))
        self._parts.clear()
        tokens, ids, weights, losses = (
            None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)
        )
        assert tokens is not None
        assert ids is not None
        self._writer.add(number + 1, tokens, ids, weights, losses)

    def flush(self) -> None:
        self._writer.flush()

    def follow(self, placement: ExpertPlacement, step: int) -> None:
        """Begins a new part of the trace, as a restart does."""
        assert self._begin is not None, "experts changed places in a trace of one placement"
        self.close()
        self._writer = self._begin(placement, step)

    def close(self) -> None:
        """Waits until all traced steps are on disk, and closes the files."""
        self._writer.close()


@contextmanager
def traced_steps(
    plan: Preflight,
    folder: RunFolder,
    env: RankEnv,
    *,
    attempt_id: str,
    step: int,
    position: int,
    numbers: Callable[[int], Sequence[Sequence[int]]],
) -> Iterator[StepTracer | None]:
    """Yields this rank's tracer, or None without `monitor.trace`. Rank 0 writes the manifest before the first step.

    Args:
        step, position: Number of steps before this attempt, and position in the stream of the attempt's first sequence.
        numbers: Method of the loader. It returns the numbers of the sequences that this rank has in a step.
    """
    config, section = plan.config, plan.config.monitor.trace
    if section is None:
        yield None
        return

    def begin(placement: ExpertPlacement, after: int) -> TraceWriter:
        place = folder.trace / f"from_step_{after}_{attempt_id}"
        place.mkdir(parents=True, exist_ok=True)
        if env.rank == 0:
            manifest = _manifest(
                config,
                plan.manifest,
                placement.groups,
                placement.rank_of_expert,
                attempt=1 + len(list(folder.trace.glob(f"*/{MANIFEST}"))),
                from_step=after,
                ranks=env.world_size,
                weights=section.weights,
                every=section.every,
                tokens=section.tokens,
                replicas=placement.replicas if isinstance(placement, PlacementWithReplicas) else (),
            )
            write_atomically(place / MANIFEST, manifest.to_json())
        return TraceWriter(place, env.rank, weights=section.weights)

    def sequences(number: int) -> Sequence[Sequence[int]]:
        return numbers(position + (number - step) * config.train.global_batch)

    fields = {"every": section.every, "tokens": section.tokens, "weights": section.weights}
    tracer = StepTracer(begin(plan.placement, step), **fields, sequences=sequences, begin=begin)
    try:
        yield tracer
    finally:
        tracer.close()


@torch.no_grad()
def trace_heldout(
    model: Transformer,
    place: Path,
    env: RankEnv,
    *,
    config: Config,
    data: DataManifest,
    groups: Sequence[ExpertGroup],
    rank_of_expert: Sequence[int],
    group_of_modality: Tensor,
    step: int,
    sequences: int,
    weights: bool,
) -> int:
    """Writes the choices and losses of held-out tokens into the folder `place`, as step `step` of a new trace. Collective.
    Raises MoeDistError if this rank could not write all its files.

    Args:
        model: The model. It must be in evaluation mode and on the device of `group_of_modality`.
        rank_of_expert: EP rank that each true expert had in training. Readers of the trace use it.
        sequences: Largest number of held-out sequences from each source.

    Returns:
        The number of tokens that this rank wrote.
    """
    place.mkdir(parents=True, exist_ok=True)
    if env.rank == 0:
        fields = {"attempt": 1, "from_step": step, "ranks": env.world_size, "weights": weights, "losses": True}
        fields["split"] = "held-out"
        write_atomically(place / MANIFEST, _manifest(config, data, groups, rank_of_expert, **fields).to_json())
    share: dict[str, Any] = {"micro_batch": config.train.micro_batch, "rank": env.rank, "world_size": env.world_size}
    options = {"seq_len": config.data.seq_len, "sequences": sequences, "most_patches": config.data.most_patches, **share}
    batches = [
        batch for source in data.sources for batch in heldout_batches(config.data.path, data, source=source, **options)
    ]
    every = len(batches) * env.world_size * config.train.micro_batch
    writer = TraceWriter(place, env.rank, weights=weights, losses=True)
    tracer = StepTracer(
        writer,
        every=1,
        tokens=None,
        weights=weights,
        sequences=lambda _: micro_batches(0, global_batch=every, **share),
    )
    try:
        for batch in batches:
            on_device = batch.to(group_of_modality.device)
            losses, reports = forward(model, on_device, group_of_modality, RoutingRequest(keep_choices=True), losses=True)
            tracer.add(on_device, reports, losses)
        tracer.finish(step - 1)
    finally:
        writer.close()
    if writer.incomplete:
        raise MoeDistError(f"{place}: the trace is incomplete, see the error above; remove the folder and trace again")
    return sum(int((~batch.padding_BS).sum()) for batch in batches)


def _manifest(
    config: Config, data: DataManifest, groups: Sequence[ExpertGroup], rank_of_expert: Sequence[int], **fields: Any
) -> Manifest:
    """Makes the manifest of a trace of this model. `fields` are those fields of `Manifest` that differ between traces."""
    return Manifest(
        layers=config.model.moe_layers,
        choices=config.model.moe.most_columns,
        groups=tuple(groups),
        rank_of_expert=tuple(rank_of_expert),
        modalities=tuple(data.modalities),
        tokenizer=data.tokenizer,
        configuration=config.model_dump(mode="json"),
        **fields,
    )


def _host(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
