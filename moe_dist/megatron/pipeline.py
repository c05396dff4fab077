"""Runs micro-batches through the model with one of Megatron's schedules: a single stage, 1F1B, or interleaved 1F1B.

Shape letters: B sequences, S positions, s positions on this rank (S / CP).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moe_dist.megatron.core_attention import positions_of_rank, view_of_rank
from moe_dist.megatron.gpt import Gpt
from moe_dist.megatron.layer_watch import LayerWatch
from moe_dist.megatron.modality import PADDING
from moe_dist.moe.routing.types import NO_REQUEST, RoutingRequest

COLLECTIVES = "Megatron's pipeline or gradient sums"  # name of the collectives that the watchdog cannot see one by one
NO_LABEL = -100  # a label below 0 means that the position adds no loss


class MicroBatch(NamedTuple):
    """A micro-batch of whole sequences, equal on all ranks of a TP x CP x PP block. Tensors are [B, S], except `share`."""

    tokens_BS: Tensor
    documents_BS: Tensor
    positions_BS: Tensor  # position of each token in its document
    group_BS: Tensor  # expert group of each token, -1 for padding
    labels_BS: Tensor
    share: Tensor  # weight of the micro-batch's auxiliary terms in the step
    request: RoutingRequest = NO_REQUEST


class Pipeline:
    """Runs forward and backward of micro-batches on all pipeline stages. All ranks must call `run` together."""

    def __init__(self, gpt: Gpt, watch: LayerWatch) -> None:
        self._gpt, self._watch = gpt, watch
        groups = gpt.groups
        self.cp_rank, self.cp_size = groups.cp.rank(), groups.cp.size()
        self._forward_backward = get_forward_backward_func()

    def columns(self, length: int) -> Tensor:
        """Returns the positions of a sequence of `length` tokens that are on this rank."""
        return positions_of_rank(length, self.cp_rank, self.cp_size)

    def _tokens(self, columns: Tensor, sequences: int, length: int) -> Tensor:
        """Returns the index in the micro-batch of each token whose hidden state is on this rank, in order [s / TP, B]."""
        tp = self._gpt.groups.tp
        part = columns.chunk(tp.size())[tp.rank()]
        return (part[:, None] + length * torch.arange(sequences, device=part.device)).flatten()

    def run(self, batches: Sequence[MicroBatch], *, divisor: Tensor, training: bool) -> list[Tensor]:
        """Runs the micro-batches, which must all have one shape.

        Args:
            divisor: Number by which the sum of the token losses is divided.
            training: If True, also runs backward, and sums the gradients over the data-parallel ranks.

        Returns:
            On the last stage, for each micro-batch the cross entropy at each position of this rank, [B, s], which is 0
                where there is no label. On earlier stages, an empty list.
        """
        losses: dict[int, Tensor] = {}
        batches, count, tracker = self._filled(batches), len(batches), self._watch.tracker

        def loss_of(at: int, labels: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            found = output.float() * (labels >= 0)
            losses[at] = found.detach()
            return found.sum() / divisor, torch.ones((), dtype=torch.int, device=found.device), {}

        def step(iterator: Iterator[tuple[int, MicroBatch]], chunk: Any) -> tuple[Tensor, Any]:
            at, batch = next(iterator)
            inside.enter_context(tracker.among(COLLECTIVES))  # entering again restarts the watchdog's time limit
            own = self.columns(batch.tokens_BS.shape[1]).to(batch.tokens_BS.device)
            labels = batch.labels_BS[:, own]
            request = replace(batch.request, token_T=self._tokens(own, *batch.tokens_BS.shape))
            self._watch.begin(at, batch.share, request)
            positions_BS = batch.positions_BS.masked_fill(batch.group_BS < 0, 0)  # padding is not the longest document
            view: Any = view_of_rank(batch.documents_BS, positions_BS, own, self._gpt.args)
            tokens, groups = batch.tokens_BS[:, own], batch.group_BS[:, own].contiguous()
            output = chunk(tokens, positions_BS[:, own], view, labels=labels, padding_mask=groups)
            return output, partial(loss_of, at, labels)

        chunks = self._gpt.chunks
        iterators = [iter(list(enumerate(batches))) for _ in chunks]
        first = batches[0].tokens_BS
        with torch.set_grad_enabled(training), tracker.among(COLLECTIVES), ExitStack() as inside:
            self._forward_backward(  # pyright: ignore[reportCallIssue]
                forward_step_func=step,
                data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks,  # pyright: ignore[reportArgumentType]
                num_microbatches=len(batches),
                seq_length=first.shape[1],
                micro_batch_size=first.shape[0],
                forward_only=not training,
            )
        return [losses[at] for at in range(count)] if losses else []

    def _filled(self, batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """Adds padding micro-batches up to a multiple of the number of stages, which the interleaved schedule needs."""
        if len(self._gpt.chunks) == 1:
            return batches
        blank = batches[0]._replace(
            group_BS=torch.full_like(batches[0].group_BS, PADDING),
            labels_BS=torch.full_like(batches[0].labels_BS, NO_LABEL),
            share=torch.zeros_like(batches[0].share),
        )
        return [*batches, *[blank] * (-len(batches) % self._gpt.groups.pp.size())]
