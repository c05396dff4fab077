"""The loss of each held-out token, and its true experts in each layer.

Shape letters: N scored tokens, L MoE layers, K choices of a token in a router's list of pairs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing import Routing
from moe_dist.train.loss import forward, token_losses


@dataclass(frozen=True)
class Tokens:
    """All scored tokens of an evaluation.

    Attributes:
        loss_N: Nats.
        load_NL: True experts in each layer; 0 where the token skips a mixture-of-depths layer.
        input_N, label_N: Ids of the tokens themselves, which are the experts' input, and of the tokens after them.
        input_filler_N, label_filler_N: Whether they are empty cells of a picture.
        input_image_N, label_image_N: Whether they are picture codes.
    """

    loss_N: np.ndarray
    load_NL: np.ndarray
    input_N: np.ndarray
    label_N: np.ndarray
    input_filler_N: np.ndarray
    label_filler_N: np.ndarray
    input_image_N: np.ndarray
    label_image_N: np.ndarray


@dataclass(frozen=True)
class TokenPairs:
    """The routing of one layer's forward.

    Attributes:
        index_T: Index in the batch of each of the router's tokens; a mixture-of-depths layer computes only some.
    """

    routing: Routing
    index_T: Tensor


@contextmanager
def recorded_routers(model: Transformer) -> Iterator[list[TokenPairs]]:
    """Inside, each forward of a router appends its decision, layer by layer."""
    seen: list[TokenPairs] = []
    chosen: list[Tensor] = []  # tokens of the current layer, if it selects its tokens

    def note_tokens(module: nn.Module, arguments: tuple[Any, ...], found: Any) -> None:
        del module, arguments
        chosen.append(found.index_C)

    def note(module: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        del module
        index_T = chosen.pop() if chosen else torch.arange(arguments[0].shape[0])
        seen.append(TokenPairs(routing, index_T))

    # Registered after all other hooks, so that a probe's changes are seen.
    handles = [layer.router.register_forward_hook(note) for layer in model.moe_modules()]
    handles += [router.register_forward_hook(note_tokens) for router in model.depth_routers()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(model: Transformer, batches: Sequence[Batch], group_of_modality: Tensor) -> Tokens:
    """Evaluates batches and keeps loss and routing of each scored token."""
    rows: list[tuple[np.ndarray, ...]] = []
    with recorded_routers(model) as seen:
        for batch in batches:
            seen.clear()
            logits_BSV, _ = forward(model, batch, group_of_modality)
            losses_BS = token_losses(logits_BSV, batch.labels_BS)
            load_TL = torch.stack([_load(each, batch.tokens_BS.numel()) for each in seen], dim=1)
            scored_T = (batch.labels_BS != IGNORED).flatten()
            columns = (
                losses_BS.flatten(),
                load_TL,
                batch.tokens_BS.flatten(),
                batch.labels_BS.flatten(),
                input_filler(batch).flatten(),
                batch.filler_BS.flatten(),
                (batch.modality_BS > 0).flatten(),
                (batch.label_modality_BS > 0).flatten(),
            )
            rows.append(tuple(column[scored_T].numpy() for column in columns))
    return Tokens(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def input_filler(batch: Batch) -> Tensor:
    """bool [B, S]: whether the token itself is an empty cell; `Batch.filler_BS` says so of the label, which is the next
    token."""
    before = torch.zeros_like(batch.filler_BS)
    before[:, 1:] = batch.filler_BS[:, :-1] & (batch.documents_BS[:, 1:] == batch.documents_BS[:, :-1])
    return before


def _load(seen: TokenPairs, num_tokens: int) -> Tensor:
    """True experts of each token of the batch [T], float64; 0 for tokens that skip the layer."""
    pairs = seen.routing.assignments.taken()
    ones = torch.ones(len(pairs.token_N), dtype=torch.float64)
    return torch.zeros(num_tokens, dtype=torch.float64).index_add_(0, seen.index_T[pairs.token_N], ones)


def losses(tokens: Tokens) -> dict[str, float]:
    """Mean held-out nats: over all labels, by the label's modality, and over codes that are not filler."""
    image_N = tokens.label_image_N
    parts = {
        "all": np.ones_like(image_N),
        "text": ~image_N,
        "image": image_N,
        "image_no_filler": image_N & ~tokens.label_filler_N,
    }
    return {name: float(tokens.loss_N[part].mean()) for name, part in parts.items() if part.any()}


def loads(tokens: Tokens) -> dict[str, Any]:
    """Mean true experts per token and layer: over all scored tokens, by layer, and by kind of token and label."""
    load_N = tokens.load_NL.mean(1)
    kinds = {
        "text": (~tokens.input_image_N, ~tokens.label_image_N),
        "image": (tokens.input_image_N, tokens.label_image_N),
        "image_filler": (tokens.input_filler_N, tokens.label_filler_N),
        "image_drawn": (tokens.input_image_N & ~tokens.input_filler_N, tokens.label_image_N & ~tokens.label_filler_N),
    }
    return {
        "all": float(load_N.mean()),
        "by_layer": [float(load) for load in tokens.load_NL.mean(0)],
        "idle": float((tokens.load_NL == 0).mean()),
        "by_input": {name: float(load_N[by].mean()) for name, (by, _) in kinds.items() if by.any()},
        "by_label": {name: float(load_N[by].mean()) for name, (_, by) in kinds.items() if by.any()},
    }


def binned(tokens: Tokens, value_N: np.ndarray, *, bins: int = 10) -> list[dict[str, Any]]:
    """Experts per token of text and image tokens (by the token's own modality), in bins of equal size of any value of the
    tokens. If modalities differ inside a bin, that value alone does not explain the difference."""
    load_N = tokens.load_NL.mean(1)
    edges = np.unique(np.quantile(value_N, np.linspace(0, 1, bins + 1)))
    place_N = np.clip(np.searchsorted(edges, value_N, side="right") - 1, 0, max(0, len(edges) - 2))
    table = []
    for place in range(max(1, len(edges) - 1)):
        row: dict[str, Any] = {"from": float(edges[place]), "to": float(edges[min(place + 1, len(edges) - 1)])}
        for name, inside in (("text", ~tokens.input_image_N), ("image", tokens.input_image_N)):
            chosen = inside & (place_N == place)
            row[name] = {"tokens": int(chosen.sum()), "load": float(load_N[chosen].mean()) if chosen.any() else None}
        table.append(row)
    return table
