"""Runs our layer in Megatron, with Megatron's groups, DDP and gradients, on the ranks of a world. Builds our model with the
same weights."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from tests.support.megatron_model import (
    Layout,
    TokenBatch,
    batch_of,
    causal_mask,
    decoder_spec,
    gpt_model,
    megatron_tensors,
    our_model,
    place_of,
    set_weights,
    transformer_config,
)

SEQUENCES = 8  # of a micro-batch, on all data-parallel ranks together


@contextlib.contextmanager
def megatron(layout: Layout) -> Iterator[Any]:
    """Sets Megatron up for a layout on all ranks of the world; yields its `parallel_state`."""
    with megatron_on_cpu(), model_parallel(ep=layout.ep, tp=layout.tp, pp=layout.pp, cp=layout.cp):
        from megatron.core import parallel_state
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        yield parallel_state


@contextlib.contextmanager
def checkpoint_writers() -> Iterator[None]:
    """Makes Megatron's checkpoint writer use threads instead of processes.

    The writer forks workers, which daemons with gloo's threads, such as the ranks of a standing world, must not do. It
    also keeps a process for its results, which would outlive a killed rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    threads = SimpleNamespace(Queue=queue.Queue, JoinableQueue=queue.Queue, Process=threading.Thread)
    before = filesystem_async.mp
    filesystem_async.mp = SimpleNamespace(get_context=lambda _: threads)  # pyright: ignore[reportAttributeAccessIssue]
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async.mp = before
        filesystem_async._results_queue = None


def wrapped(model: Any, config: Any) -> Any:
    """Returns the model in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    return DistributedDataParallel(config, settings, model)


def build(layout: Layout, state: Any) -> tuple[Any, Any, TokenBatch, TokenBatch]:
    """Returns Megatron's model (in its DDP) and ours with equal weights, this rank's batch, and the batch of all ranks."""
    settings, config = layout.settings, transformer_config(layout)
    ours = our_model(settings)
    model = gpt_model(config, decoder_spec(layout, config))
    set_weights(model, megatron_tensors(model, ours, place_of(layout, state)))
    whole = batch_of(SEQUENCES, settings)
    return wrapped(model, config), ours, whole.part(own_sequences(state)), whole


def backward(model: Any, batch: TokenBatch, *, modalities: bool = True) -> None:
    """Computes Megatron's reduced gradients of the mean loss."""
    from megatron.core.distributed import finalize_model_grads

    model.zero_grad_buffer()
    ids = batch.modality_BS if modalities else None
    losses = model(batch.tokens_BS, batch.positions, causal_mask(), labels=batch.labels_BS, padding_mask=ids)
    losses.mean().backward()
    finalize_model_grads([model], None)


def own_sequences(state: Any) -> slice:
    """Returns this rank's sequences of a micro-batch."""
    each = SEQUENCES // state.get_data_parallel_world_size()
    first = state.get_data_parallel_rank() * each
    return slice(first, first + each)


def tracked() -> dict[str, list[float]]:
    """Returns Megatron's tracked auxiliary terms by layer, after its own reduction."""
    try:
        from megatron.core.transformer.moe.moe_logging import (  # pyright: ignore[reportMissingImports]
            destroy_moe_metrics_tracker,
            get_moe_metrics_tracker,
        )
    except ImportError:
        from megatron.core.transformer.moe import moe_utils

        moe_utils.reduce_aux_losses_tracker_across_ranks()
        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        values = {name: entry["values"].tolist() for name, entry in tracker.items()}
        tracker.clear()
        return values
    tracker = get_moe_metrics_tracker()
    tracker._sync_metrics(list(tracker.metrics))
    values = {name: entry.values.tolist() for name, entry in tracker.metrics.items()}
    destroy_moe_metrics_tracker()
    return values
