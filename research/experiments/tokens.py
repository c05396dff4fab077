"""Evaluates a model token by token. Measures the loss and the number of true (not null) experts of each held-out token, the
right answers of instruction data, and the rows that an EP group would send.

The evaluation runs on one rank and sends no token rows. It can count the rows that an EP group would send, because their
number depends only on the expert choices. Sequences are assigned to the group's ranks in turn, as in the loader. Rows are
counted in forward, per token and layer. `moe_dist.moe.dispatch.ledger` counts the rows that other dispatch methods would
send for the same choices.

Shape letters: B sequences, S positions of a sequence, T = B x S, N scored tokens, L MoE layers, V vocabulary, R ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moe_dist.config.parallel.section import InterleavedSection
from moe_dist.data.batch import IGNORED, Batch
from moe_dist.model.transformer import Transformer
from moe_dist.moe.dispatch.ledger import compare
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import Routing
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.plan.policies import make_placement
from moe_dist.train.objective.loss import forward

ROWS = ("rows_remote", "rows_per_pair", "rows_topk", "rows_same_active", "rows_null_remapped")


@dataclass(frozen=True)
class Tokens:
    """All scored tokens of an evaluation. `input` is the token that the experts process, and `label` is the next token."""

    loss_N: np.ndarray  # loss in nats
    load_NL: np.ndarray  # number of true experts in each layer; 0 if the token skips a mixture-of-depths layer
    input_N: np.ndarray  # token ids
    label_N: np.ndarray
    input_filler_N: np.ndarray  # true for an empty cell of a picture: a code that shows only background
    label_filler_N: np.ndarray
    input_image_N: np.ndarray  # true for a picture code
    label_image_N: np.ndarray


@dataclass(frozen=True)
class TokenPairs:
    """The routing of a batch's tokens in one layer."""

    routing: Routing
    index_T: Tensor  # index of each routed token in the batch; a mixture-of-depths layer routes only some tokens


@contextmanager
def recorded_routers(model: Transformer) -> Iterator[list[TokenPairs]]:
    """Inside the context, each forward of a router appends its routing to the yielded list, in the order of the layers."""
    seen: list[TokenPairs] = []
    chosen: list[Tensor] = []  # indices of the tokens of a mixture-of-depths layer

    def note_tokens(module: nn.Module, arguments: tuple[Any, ...], found: Any) -> None:
        del module, arguments
        chosen.append(found.index_C)

    def note(module: nn.Module, arguments: tuple[Any, ...], routing: Routing) -> None:
        del module
        index_T = chosen.pop() if chosen else torch.arange(arguments[0].shape[0])
        seen.append(TokenPairs(routing, index_T))

    with ExitStack() as stack:
        # The hooks below run after a probe's hooks, so that the list has the changed routing.
        for layer in model.moe_modules():
            stack.enter_context(layer.router.register_forward_hook(note))
        for router in model.depth_routers():
            stack.enter_context(router.register_forward_hook(note_tokens))
        yield seen


@torch.no_grad()
def evaluate(model: Transformer, batches: Sequence[Batch], group_of_modality: Tensor, *, image: int = 1) -> Tokens:
    """Evaluates batches. Returns the loss and the numbers of true experts of each scored token. `image` is the index of the
    modality of picture codes; no token has the index -1."""
    rows: list[tuple[np.ndarray, ...]] = []
    with recorded_routers(model) as seen:
        for batch in batches:
            seen.clear()
            losses_BS, _ = forward(model, batch, group_of_modality, losses=True)
            load_TL = torch.stack([_load(each, batch.tokens_BS.numel()) for each in seen], dim=1)
            scored_T = (batch.labels_BS != IGNORED).flatten()
            columns = (
                losses_BS.flatten(),
                load_TL,
                batch.tokens_BS.flatten(),
                batch.labels_BS.flatten(),
                input_filler(batch).flatten(),
                batch.filler_BS.flatten(),
                (batch.modality_BS == image).flatten(),
                (batch.label_modality_BS == image).flatten(),
            )
            rows.append(tuple(column[scored_T].numpy() for column in columns))
    return Tokens(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def input_filler(batch: Batch) -> Tensor:
    """Returns whether each token is an empty cell of a picture, bool [B, S]. (`Batch.filler_BS` tells this about the next
    token.) The first token of a document does not count as an empty cell."""
    before = torch.zeros_like(batch.filler_BS)
    before[:, 1:] = batch.filler_BS[:, :-1] & (batch.documents_BS[:, 1:] == batch.documents_BS[:, :-1])
    return before


def _load(seen: TokenPairs, num_tokens: int) -> Tensor:
    """Returns the number of true experts of each token in the batch, float64 [T]; 0 for tokens that skip the layer."""
    pairs = seen.routing.assignments.taken()
    ones = torch.ones(len(pairs.token_N), dtype=torch.float64)
    return torch.zeros(num_tokens, dtype=torch.float64).index_add_(0, seen.index_T[pairs.token_N], ones)


def losses(tokens: Tokens) -> dict[str, float]:
    """Returns the mean held-out nats of all labels, text labels, picture codes, and codes of cells that are not empty."""
    image_N = tokens.label_image_N
    parts = {
        "all": np.ones_like(image_N),
        "text": ~image_N,
        "image": image_N,
        "image_no_filler": image_N & ~tokens.label_filler_N,
    }
    return {name: float(tokens.loss_N[part].mean()) for name, part in parts.items() if part.any()}


def loads(tokens: Tokens) -> dict[str, Any]:
    """Returns the mean number of true experts per token and layer: over all scored tokens, by layer, and by kind of token
    or label. `idle` is the fraction of (token, layer) pairs in which the token has no expert."""
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


def tables_of(tokens: Tokens, image_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two tables [L, V] with the mean number of true experts per token in each layer: over the tokens with this id,
    and over the tokens of the id's modality. `image_V` is true for picture codes. An id without a token gets the mean of
    its modality. A modality without a token has the mean 0."""
    vocab_size, layers = len(image_V), tokens.load_NL.shape[1]
    by_id_LV, by_modality_LV = np.zeros((layers, vocab_size)), np.zeros((layers, vocab_size))
    count_V = np.bincount(tokens.input_N, minlength=vocab_size)
    for layer, load_N in enumerate(tokens.load_NL.T):
        for inside_N, ids_V in ((tokens.input_image_N, image_V), (~tokens.input_image_N, ~image_V)):
            by_modality_LV[layer, ids_V] = load_N[inside_N].mean() if inside_N.any() else 0.0
        sum_V = np.bincount(tokens.input_N, weights=load_N, minlength=vocab_size)
        by_id_LV[layer] = np.where(count_V > 0, sum_V / np.maximum(count_V, 1), by_modality_LV[layer])
    return by_id_LV, by_modality_LV


def binned(tokens: Tokens, value_N: np.ndarray, *, bins: int = 10) -> list[dict[str, Any]]:
    """Sorts tokens by a value into bins with equally many tokens. Returns for each bin the mean number of true experts of
    text tokens and of image tokens. If these two differ in a bin, the value alone does not determine the number of
    experts."""
    load_N = tokens.load_NL.mean(1)
    edges = np.unique(np.quantile(value_N, np.linspace(0, 1, bins + 1)))  # merges bins with equal edges
    place_N = np.clip(np.searchsorted(edges, value_N, side="right") - 1, 0, max(0, len(edges) - 2))
    table = []
    for place in range(max(1, len(edges) - 1)):
        row: dict[str, Any] = {"from": float(edges[place]), "to": float(edges[min(place + 1, len(edges) - 1)])}
        for name, inside in (("text", ~tokens.input_image_N), ("image", tokens.input_image_N)):
            chosen = inside & (place_N == place)
            row[name] = {"tokens": int(chosen.sum()), "load": float(load_N[chosen].mean()) if chosen.any() else None}
        table.append(row)
    return table


@torch.no_grad()
def accuracy(
    model: Transformer, batches: Sequence[Batch], group_of_modality: Tensor, *, image: int = 1
) -> dict[str, float]:
    """Returns the fraction of labels that are the model's most likely token, for all labels, for text labels, and for
    picture codes. `image` is the index of the modality of picture codes."""
    right, kinds = [], []
    for batch in batches:
        logits_BSV, _ = forward(model, batch, group_of_modality)
        scored_BS = batch.labels_BS != IGNORED
        right.append((logits_BSV.argmax(-1) == batch.labels_BS)[scored_BS])
        kinds.append((batch.label_modality_BS == image)[scored_BS])
    right_N, image_N = torch.cat(right).double(), torch.cat(kinds)
    parts = {"all": torch.ones_like(image_N), "text": ~image_N, "image": image_N}
    return {name: float(right_N[part].mean()) for name, part in parts.items() if part.any()}


@torch.no_grad()
def answers(model: Transformer, batches: Mapping[str, Sequence[Batch]], group_of_modality: Tensor) -> dict[str, Any]:
    """For each source, counts the documents with scored tokens and the documents with a right answer, and sums the answers'
    nats. Then averages accuracy and nats over sources.

    A document that was cut at the end of a sequence counts once for each piece with a scored token.
    """
    found: dict[str, Any] = {}
    for source, of_source in batches.items():
        documents, right, nats = 0, 0, 0.0
        for batch in of_source:
            logits_BSV, _ = forward(model, batch, group_of_modality)
            one, all_right = right_documents(logits_BSV.argmax(-1), batch)
            documents, right = documents + one, right + all_right
            labels_T = batch.labels_BS.flatten()
            nats += float(cross_entropy(logits_BSV.flatten(0, 1), labels_T, ignore_index=IGNORED, reduction="sum"))
        count = max(1, documents)
        found[source] = {"documents": documents, "right": right, "accuracy": right / count, "nats": nats / count}
    means = {key: sum(each[key] for each in found.values()) / len(found) for key in ("accuracy", "nats")}
    return {**means, "by_source": found}


def right_documents(likeliest_BS: Tensor, batch: Batch) -> tuple[int, int]:
    """Returns how many documents of a batch have scored tokens, and how many have only right scored tokens."""
    scored_BS = batch.labels_BS != IGNORED
    wrong_BS = scored_BS & (likeliest_BS != batch.labels_BS)
    row_BS = torch.arange(len(scored_BS))[:, None].expand_as(scored_BS)
    keys = torch.stack([row_BS, batch.documents_BS.to(row_BS.dtype)], dim=-1)
    documents, wrong = (len(torch.unique(keys[mask_BS], dim=0)) for mask_BS in (scored_BS, wrong_BS))
    return documents, documents - wrong


def spread(placement: ExpertPlacement, ep: int) -> ExpertPlacement:
    """Returns a placement in which the experts of a run are interleaved over `ep` ranks."""
    return make_placement(InterleavedSection(), placement.groups, num_ranks=ep, token_mix={})


class SentRows:
    """Sums the numbers of token rows that the ranks of the placement's EP group would send."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._placement = placement
        self._rank_of_expert = torch.tensor(placement.rank_of_expert)
        self._sums = dict.fromkeys(ROWS, 0.0)
        self._tokens = 0

    def add(self, routing: Routing, rank_T: np.ndarray) -> None:
        """Adds the routing of T tokens in one layer. Token t is on rank rank_T[t]. Takes O(T x ranks) memory."""
        pairs, num_tokens = routing.assignments.taken(), len(rank_T)
        ranks, own_T = self._placement.num_ranks, torch.from_numpy(rank_T)
        goes_TR = torch.zeros(num_tokens, ranks, dtype=torch.bool)
        goes_TR[pairs.token_N, self._rank_of_expert[pairs.expert_N]] = True
        goes_TR[torch.arange(num_tokens), own_T] = False  # rows for experts on the token's own rank are not sent
        remote_N = self._rank_of_expert[pairs.expert_N] != own_T[pairs.token_N]
        # `Routing` does not tell which token made a null choice. So the null choices, and the tokens of each expert group,
        # are divided among the ranks in proportion to the numbers of tokens of the ranks.
        groups, counts = self._placement.groups, routing.counts
        experts = [group.num_experts for group in groups]
        nulls = [group.num_null for group in groups]
        null_G = [float(part.sum()) for part in counts.choices_LC[0][sum(experts) :][: sum(nulls)].split(nulls)]
        group_of_expert = torch.tensor([i for i, group in enumerate(groups) for _ in group.experts])
        for rank in range(ranks):
            mine_T = own_T == rank
            share = float(mine_T.float().mean())
            mine_N = mine_T[pairs.token_N]
            true_G = torch.bincount(group_of_expert[pairs.expert_N[mine_N]], minlength=len(groups)).tolist()
            ledger = compare(
                self._placement,
                rank,
                SentCounts(int(goes_TR[mine_T].sum()), int(mine_N.sum()), int((remote_N & mine_N).sum())),
                true_choices_G=true_G,
                null_choices_G=[round(share * each) for each in null_G],
                tokens_G=[round(share * each) for each in counts.tokens_LG[0].tolist()],
            )
            for key in ROWS:
                self._sums[key] += ledger[key]
        self._tokens += int(counts.tokens_LG.sum())

    def per_token(self) -> Mapping[str, float]:
        """Returns the mean number of token rows that are sent per token and layer, for each dispatch method."""
        return {key: value / max(1, self._tokens) for key, value in self._sums.items()}


def rank_of_tokens(num_sequences: int, seq_len: int, ranks: int) -> np.ndarray:
    """Returns the rank of each token of a batch [T]. Sequences are assigned to ranks in turn."""
    return np.repeat(np.arange(num_sequences) % ranks, seq_len)
