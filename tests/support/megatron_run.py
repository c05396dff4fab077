"""Our layer in a running Megatron (groups, DDP, gradients), and the same model of ours beside it."""

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moe_dist.megatron.cpu_trial import megatron_on_cpu
from moe_dist.megatron.process_groups import model_parallel
from tests.support.megatron_model import (
    LAYERS,
    Layout,
    TokenBatch,
    batch_of,
    decoder_spec,
    gpt_model,
    megatron_tensors,
    our_model,
    set_weights,
    transformer_config,
)

SEQUENCES = 8  # sequences of a micro-batch over all data-parallel ranks


@contextlib.contextmanager
def megatron(layout: Layout) -> Iterator[Any]:
    """Initialises Megatron for a layout on all ranks of the world. Yields its `parallel_state`."""
    with megatron_on_cpu(), model_parallel(ep=layout.ep, tp=layout.tp, pp=layout.pp, cp=layout.cp):
        from megatron.core import parallel_state
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        yield parallel_state


@contextlib.contextmanager
def checkpoint_writers() -> Iterator[None]:
    """Makes Megatron's checkpoint writer use threads instead of processes.

    Ranks of these tests are daemons with gloo's threads, and must not fork workers. Megatron's process for results would
    also outlive a killed rank.
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


def wrapped(model: Any, config: Any, **options: Any) -> Any:
    """Returns the model in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, **options)
    return DistributedDataParallel(config, settings, model)


def place_of(state: Any) -> dict[str, int]:
    """Returns this rank's position, as `megatron_tensors` needs it."""
    return {
        "ep_rank": state.get_expert_model_parallel_rank(),
        "tp_rank": state.get_tensor_model_parallel_rank(),
        "tp_size": state.get_tensor_model_parallel_world_size(),
    }


def build(layout: Layout, state: Any) -> tuple[Any, Any, TokenBatch, TokenBatch]:
    """Returns Megatron's model (in its DDP) and ours with the same weights, this rank's batch, and the whole batch."""
    settings, config = layout.settings, transformer_config(layout)
    ours = our_model(settings)
    model = gpt_model(config, decoder_spec(layout, config))
    set_weights(model, megatron_tensors(dict(ours.named_parameters()), settings.place(layout.ep), **place_of(state)))
    whole = batch_of(SEQUENCES, settings)
    each = SEQUENCES // state.get_data_parallel_world_size()
    return wrapped(model, config), ours, whole.part(state.get_data_parallel_rank() * each, each), whole


def expected_gradients(
    layout: Layout, ours: Any, state: Any, layers: Sequence[int] = range(LAYERS)
) -> dict[str, torch.Tensor]:
    """Returns gradients of our model in the form of this rank's Megatron parameters."""
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    return megatron_tensors(gradients, layout.settings.place(layout.ep), layers=layers, **place_of(state))


def tracked() -> dict[str, list[float]]:
    """Returns Megatron's tracked values by layer, after its own reduction."""
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
