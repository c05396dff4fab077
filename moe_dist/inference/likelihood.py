"""Log-likelihood of continuations, over any number of ranks. Shape letters: B sequences, S positions, V vocabulary.

Sequences of similar length share a batch, padded at the end. Each is computed whole, so every choice computes its question
again. A cache would save that, but the ranks of an EP group would have to agree on its lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.config.manifest import Manifest
from moe_dist.data.batch import Batch, BatchMaker, Segment
from moe_dist.errors import ConfigError
from moe_dist.model.transformer import Transformer
from moe_dist.train.loss import forward, token_losses

_BATCH_LOGITS = 1 << 26  # 256 MiB in fp32, and the same again for the losses


class Continuation(NamedTuple):
    """Token ids: the given context, and the continuation to score; at least one token each."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """Attributes: nats: log-likelihood of the continuation. greedy: whether each of its tokens is the likeliest."""

    nats: float
    greedy: bool


class Likelihood:
    """Scores continuations with one model; each rank scores its share.

    Args:
        model: With this rank's experts; put into evaluation mode: no capacity, no noise, and the causal router where
            experts choose their tokens.
        manifest: The manifest of its data.
        group_of_modality: Expert group of each modality.
        max_seq_len: Longest sequence that the model supports.
        world: All ranks; None for one.
        rank, world_size: This rank among them.
        batch_tokens: Tokens in one batch of a rank, padding included; fewer if the vocabulary is large.
    """

    def __init__(
        self,
        model: Transformer,
        manifest: Manifest,
        *,
        group_of_modality: Sequence[int],
        max_seq_len: int,
        world: dist.ProcessGroup | None = None,
        rank: int = 0,
        world_size: int = 1,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self._manifest, self._max_seq_len = model.eval(), manifest, max_seq_len
        self._device = model.embedding.weight.device
        self._group_of_modality = torch.tensor(group_of_modality, device=self._device)
        self._batch_tokens = batch_tokens
        self.world, self._rank, self._world_size = world, rank, world_size

    @torch.no_grad()
    def __call__(self, continuations: Sequence[Continuation]) -> list[Score]:
        """The score of each, in order. Collective: every rank passes the same continuations and gets all scores.

        Raises:
            ConfigError: a continuation is empty or longer than the model supports; raised before anything is computed.
        """
        check_lengths(continuations, self._max_seq_len)
        # Every rank runs the same number of batches, since its experts take part in each; the last round is filled by
        # padding.
        batches = self._batches([len(each.context) + len(each.tokens) for each in continuations])
        batches += [[]] * (-len(batches) % self._world_size)
        nats_and_greedy = torch.zeros(len(continuations), 2, dtype=torch.float64, device=self._device)
        for indices in batches[self._rank :: self._world_size]:
            found = self._score([continuations[index] for index in indices])
            nats_and_greedy[indices] = found
        sum_over(nats_and_greedy, self.world, name="log-likelihoods")
        return [Score(nats, greedy > 0.5) for nats, greedy in nats_and_greedy.tolist()]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of each batch, the longest sequences first, so that the first batch shows whether memory is enough."""
        most = max(1, min(self._batch_tokens, _BATCH_LOGITS // self.model.args.vocab_size))
        batches: list[list[int]] = []
        room = 0
        for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
            if room <= 0:
                batches.append([])
                room = max(1, most // lengths[index])
            batches[-1].append(index)
            room -= 1
        return batches

    def _score(self, batch: Sequence[Continuation]) -> Tensor:
        """float64 [B, 2]: nats, and 1 if the continuation is greedy."""
        tokens = [np.array([*each.context, *each.tokens], np.int64) for each in batch]
        length = max((len(each) - 1 for each in tokens), default=1)
        maker = BatchMaker(
            seq_len=length, pad_id=self._manifest.pad_id, modalities=tuple(self._manifest.modalities.values())
        )
        rows = [[Segment(each, np.zeros(len(each), bool), len(each) - 1)] for each in tokens]
        made: Batch = maker.make(rows or [[]]).to(self._device)
        logits_BSV, _ = forward(self.model, made, self._group_of_modality)
        if not batch:
            return torch.zeros(0, 2, dtype=torch.float64, device=self._device)
        losses_BS = token_losses(logits_BSV, made.labels_BS).to(torch.float64)
        position_S = torch.arange(length, device=self._device)
        first_B = torch.tensor([len(each.context) - 1 for each in batch], device=self._device)
        end_B = torch.tensor([len(each) - 1 for each in tokens], device=self._device)
        scored_BS = (position_S >= first_B[:, None]) & (position_S < end_B[:, None])
        nats_B = -torch.where(scored_BS, losses_BS, 0.0).sum(1)
        greedy_B = ((logits_BSV.argmax(-1) == made.labels_BS) | ~scored_BS).all(1)
        return torch.stack([nats_B, greedy_B.to(torch.float64)], dim=1)


def check_lengths(continuations: Sequence[Continuation], max_seq_len: int) -> None:
    """Refuses continuations that are empty or too long. Raises: ConfigError."""
    if not all(each.context and each.tokens for each in continuations):
        raise ConfigError("a question and each of its choices must be one token at least")
    # The last token is scored but never an input.
    longest = max((len(each.context) + len(each.tokens) - 1 for each in continuations), default=0)
    if longest > max_seq_len:
        raise ConfigError(
            f"a question and its choice are {longest} tokens, more than model.max_seq_len={max_seq_len}, the longest the "
            "model is made for; leave that task out of --tasks, or --rotations, which lists all choices in each question"
        )
