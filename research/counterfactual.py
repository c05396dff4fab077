"""Measures how the loss changes if one token takes other experts.

Shape letters: B sequences, S positions, T tokens of this rank, L MoE layers, K choices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_dist.data.batch import Batch
from moe_dist.errors import ConfigError
from moe_dist.model.transformer import Transformer
from moe_dist.moe.replayed_routers import Replay, replayable_routers
from moe_dist.moe.routing.types import ABSENT, RoutingRequest
from moe_dist.train.objective.loss import forward


@torch.no_grad()
def counterfactual(
    model: Transformer, batch: Batch, group_of_modality: Tensor, *, token: int, layer: int, choice: Sequence[int]
) -> Tensor:
    """Returns by how much the cross entropy of each label [B, S] rises if one token takes other experts in one MoE layer.
    All other expert choices stay unchanged, also those in later layers. Costs two forward passes. Collective: every rank of
    an EP group calls the function with a token from its own batch.

    Args:
        token: Index of the token in the batch flattened to B x S.
        layer: Index of the layer among the MoE layers.
        choice: Indices of the k expert columns that the token takes instead, where k is top_k of the token's group.

    Raises:
        ConfigError: there is no such token or layer, or the model has a router that cannot replay.
        DataError: the token cannot choose the columns in `choice`.
    """
    replayable_routers(model)
    before_BS, reports = forward(model, batch, group_of_modality, RoutingRequest(keep_choices=True), losses=True)
    ids_TLK = torch.stack([each.chosen.column_TK for each in reports if each.chosen is not None], 1).long().cpu().numpy()
    tokens, layers, choices = ids_TLK.shape
    if not (0 <= token < tokens and 0 <= layer < layers and len(choice) <= choices):
        raise ConfigError(
            f"counterfactual: token={token}, layer={layer}, {len(choice)} choices, but the batch has {tokens} tokens, and "
            f"the model {layers} MoE layers with at most {choices} choices; take smaller numbers, counted from 0"
        )
    ids_TLK[token, layer] = [*choice, *[ABSENT] * (choices - len(choice))]
    group_BS = group_of_modality[batch.modality_BS].masked_fill(batch.padding_BS, -1)
    with Replay(model, ids_TLK, group_BS.flatten().cpu().numpy(), source="counterfactual"):
        after_BS, _ = forward(model, batch, group_of_modality, losses=True)
    return after_BS - before_BS
