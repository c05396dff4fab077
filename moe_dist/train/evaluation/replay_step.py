"""Replays a step of a trace by giving routers the traced expert choices.

Shape letters: B sequences, S positions, T tokens of this rank, L MoE layers, K choices.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError, DataError
from moe_dist.moe.replayed_routers import ONE_FEWER, Replay, replayable_routers
from moe_dist.moe.routing.types import ABSENT
from moe_dist.monitor.trace.foreign import NO_ID
from moe_dist.monitor.trace.reader import TracedStep
from moe_dist.placement.placement import ExpertGroup


def replay_step(
    model: torch.nn.Module,
    traced: TracedStep,
    batches: Sequence[Batch],
    sequences: Sequence[Sequence[int]],
    group_of_modality: Tensor,
    *,
    source: str,
) -> Replay:
    """Returns a replay of a traced step for this rank's micro-batches. The replay finds tokens by sequence and position.
    Micro-batches, number of ranks and placement may therefore differ from the traced run.

    Args:
        traced: A step of a run's trace (`read_trace`), or of another system's trace (`read_foreign`).
        batches, sequences: This rank's micro-batches on the host, and, for each micro-batch, the numbers of its sequences
            in the trace. For a run's trace `data.order.micro_batches` gives these numbers. In another system's trace each
            file is one sequence, and the numbers start at 0.
        group_of_modality: Index of the expert group of each modality of the batches.

    Raises:
        ConfigError: the model has a router that cannot replay.
        DataError: the traced step has a different model or different tokens, or the trace lacks tokens of the batches.
    """
    routers, recorded = replayable_routers(model), traced.manifest
    ours, theirs = _columns(routers[0].groups), _columns(recorded.groups)
    if ours != theirs or len(routers) != len(recorded.layers):
        raise DataError(
            f"{source}: groups={theirs} (true, null, identity, constant experts, and choices of a token) in "
            f"{len(recorded.layers)} MoE layers, but the model has {ours} in {len(routers)} layers; a replay needs equal "
            "numbers, so give the trace of this model"
        )
    real_T = ~torch.cat([batch.padding_BS.flatten() for batch in batches]).numpy()
    modality_T = torch.cat([batch.modality_BS.flatten() for batch in batches]).numpy()
    token_T = torch.cat([batch.tokens_BS.flatten() for batch in batches]).numpy()
    ids_TLK = np.full((len(real_T), *traced.ids.shape[1:]), ABSENT, np.int16)
    ids_TLK[real_T] = traced.ids[_rows(traced, batches, sequences, real_T, token_T, source)]
    return Replay(model, ids_TLK, np.where(real_T, group_of_modality.cpu().numpy()[modality_T], -1), source=source)


def _columns(groups: Sequence[ExpertGroup]) -> list[tuple[int, ...]]:
    return [(g.num_experts, g.num_null, g.num_identity, g.num_constant, g.top_k) for g in groups]


def _rows(
    traced: TracedStep,
    batches: Sequence[Batch],
    sequences: Sequence[Sequence[int]],
    real_T: np.ndarray,
    token_T: np.ndarray,
    source: str,
) -> np.ndarray:
    """Returns, for each token of this rank that is not padding, its index in the trace."""
    length = batches[0].tokens_BS.shape[1]
    number_T = np.repeat(np.concatenate([np.asarray(part) for part in sequences]), length)
    if len(number_T) != len(real_T):
        raise ConfigError(
            f"sequences={list(sequences)}: {len(number_T) // length} sequences, but the batches have "
            f"{len(real_T) // length}; give one range for each micro-batch"
        )
    place_T = np.tile(np.arange(length), len(number_T) // length)
    number_T, place_T, token_T = (each[real_T] for each in (number_T, place_T, token_T))
    key, wanted_T = _key(traced.tokens["sequence"], traced.tokens["position"]), _key(number_T, place_T)
    missing_T = np.isin(wanted_T, key, invert=True)
    if missing_T.any():
        first = int(missing_T.argmax())
        raise DataError(
            f"{source}: sequence={number_T[first]}, position={place_T[first]} is not among the {len(key)} traced tokens; "
            "a replay needs all tokens of the batch; "
            + (
                f"{ONE_FEWER} (padding_BS)"
                if (traced.tokens["token"] == NO_ID).all()
                else "give the batch of that step, traced with monitor.trace.tokens=null"
            )
        )
    order = np.argsort(key)
    found_T = order[np.searchsorted(key, wanted_T, sorter=order)]
    recorded_T = traced.tokens["token"][found_T]
    other_T = (recorded_T != token_T) & (recorded_T != NO_ID)
    if other_T.any():
        first = int(other_T.argmax())
        raise DataError(
            f"{source}: token={recorded_T[first]} at sequence={number_T[first]}, position={place_T[first]}, but the batch "
            f"has token {token_T[first]} there; a replay needs the tokens of the trace, so give the batch of that step"
        )
    return found_T


def _key(sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    return sequence.astype(np.int64) << 32 | position
