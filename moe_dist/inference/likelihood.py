"""Computes log-likelihoods of continuations, on any number of ranks. Shape letters: B sequences, S positions, V vocabulary.

A batch contains sequences of similar length, padded at the end. If a context has several continuations, the model computes
it again for each of them. A key-value cache would avoid this, but the ranks of an EP group would have to agree on the
caches' lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.data.batch import IGNORED
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest
from moe_dist.model.layers import token_losses
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.mesh import Mesh
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker, batches_by_length
from moe_dist.train.router_tuning.samples import TuningSample


class Continuation(NamedTuple):
    """The token ids of a context and of the continuation to score (`tokens`). Both have at least one token."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """The log-likelihood of one continuation, and whether greedy decoding would produce it."""

    nats: float  # log-likelihood of the continuation's tokens
    greedy: bool  # True if each token of the continuation is the most likely one at its position


class Likelihood:
    """Scores continuations with one model. Each rank scores a part of the continuations.

    Args:
        model: The model with this rank's experts. The constructor puts it into evaluation mode, in which routing has no
            capacity limit and no noise, and does not depend on later tokens.
        group_of_modality: The index of each modality's expert group.
        max_seq_len: Largest number of tokens in a sequence that the model supports.
        mesh: All ranks; None for a single rank.
        batch_tokens: Largest number of tokens in one rank's batch, padding included.
    """

    def __init__(
        self,
        model: Transformer,
        manifest: Manifest,
        *,
        group_of_modality: Sequence[int],
        max_seq_len: int,
        mesh: Mesh | None = None,
        batch_tokens: int = 4096,
    ) -> None:
        self.model, self._mesh = model.eval(), mesh
        self._maker, self._max_seq_len, self._batch_tokens = SampleMaker(manifest), max_seq_len, batch_tokens
        self._device = next(model.parameters()).device
        self._group_of_modality = torch.tensor(group_of_modality, device=self._device)

    @torch.no_grad()
    def __call__(self, continuations: Sequence[Continuation]) -> list[Score]:
        """Returns the scores in the order of the continuations. Every rank must pass all continuations, and gets all
        scores.

        Raises:
            ConfigError: see `check_lengths`. It is raised before any computation.
        """
        check_lengths(continuations, self._max_seq_len)
        lengths, vocab_size = [len(each.context) + len(each.tokens) for each in continuations], self.model.args.vocab_size
        nats_and_greedy = torch.zeros(len(continuations), 2, dtype=torch.float64, device=self._device)
        for indices in batches_by_length(lengths, tokens=self._batch_tokens, vocab_size=vocab_size, mesh=self._mesh):
            nats_and_greedy[indices] = self._score([continuations[index] for index in indices])
        sum_over(nats_and_greedy, None if self._mesh is None else self._mesh.world, name="log-likelihoods")
        return [Score(nats, greedy > 0.5) for nats, greedy in nats_and_greedy.tolist()]  # device-to-host sync

    def _score(self, batch: Sequence[Continuation]) -> Tensor:
        """Returns the fields of each continuation's `Score`, float64 [B, 2]; `greedy` is 1 or 0."""
        samples = [TuningSample(np.array(context, np.int64), np.array(tokens, np.int64)) for context, tokens in batch]
        made = self._maker.make(samples).to(self._device)
        logits_BSV, _ = forward(self.model, made, self._group_of_modality)  # a batch of padding joins the collectives, too
        nats_B = -token_losses(logits_BSV, made.labels_BS).to(torch.float64).sum(1)  # 0 where the label is IGNORED
        greedy_B = ((logits_BSV.argmax(-1) == made.labels_BS) | (made.labels_BS == IGNORED)).all(1)
        return torch.stack([nats_B, greedy_B.to(torch.float64)], dim=1)[: len(batch)]


def check_lengths(continuations: Sequence[Continuation], max_seq_len: int) -> None:
    """Raises ConfigError if a context or continuation is empty, or if their total number of tokens, not counting the last
    token, is above `max_seq_len`."""
    if not all(each.context and each.tokens for each in continuations):
        raise ConfigError("a question and each of its choices must be one token at least")
    # The last token is only a label, not an input.
    longest = max((len(each.context) + len(each.tokens) - 1 for each in continuations), default=0)
    if longest > max_seq_len:
        raise ConfigError(
            f"a question and its choice are {longest} tokens, more than model.max_seq_len={max_seq_len}, the longest the "
            "model is made for; leave that task out of --tasks, or --rotations, which lists all choices in each question"
        )
