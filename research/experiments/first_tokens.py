"""Answers multiple-choice questions by the first tokens of the choices. The model's answer is the choice whose first token
has the highest logit after the question. `router_tuning.objective: choices` trains the same logits.

A question can be answered in this way only if no wrong choice has the same first token as the right choice. An answer costs
one forward of the prompt.

Shape letters: B questions of a batch, S positions, V vocabulary, K choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_dist.inference.likelihood import Continuation
from moe_dist.inference.router_tuning.scoring import first_tokens
from moe_dist.model.transformer import Transformer
from moe_dist.train.objective.loss import forward
from moe_dist.train.router_tuning.loader import SampleMaker, batches_by_length
from moe_dist.train.router_tuning.samples import TuningSample

_BATCH_TOKENS = 4096  # tokens per batch, padding included


def has_own_first_token(choices: Sequence[Continuation], answer: int) -> bool:
    """Returns whether the first token of the right choice `answer` differs from the first tokens of all wrong choices."""
    return int(first_tokens(choices, answer)[0]) >= 0


def shortened(choices: Sequence[Continuation]) -> list[Continuation]:
    """Returns the choices with only their first token."""
    return [Continuation(each.context, each.tokens[:1]) for each in choices]


@dataclass
class FirstTokens:
    """Answers questions that have the same number of choices."""

    model: Transformer  # must be in evaluation mode
    maker: SampleMaker  # makes batches of prompts
    group_of_modality: Tensor  # int64 [M], index of the expert group of each of the M modalities

    @torch.no_grad()
    def __call__(self, written: Sequence[Sequence[Continuation]]) -> list[int]:
        """Returns, for each question, the index of the choice whose first token has the highest logit. If several choices
        have the same first token, the first of these choices counts.

        Args:
            written: The choices of each question, as tokens.
        """
        taken = [0] * len(written)
        lengths = [len(choices[0].context) for choices in written]
        vocab_size = self.model.args.vocab_size
        for places in batches_by_length(lengths, tokens=_BATCH_TOKENS, vocab_size=vocab_size, mesh=None):
            for place, choice in zip(places, self._answers([written[place] for place in places]), strict=True):
                taken[place] = choice
        return taken

    def _answers(self, written: Sequence[Sequence[Continuation]]) -> list[int]:
        # A sample needs an answer, which is not an input. The first token of the first choice serves as this answer.
        samples = [TuningSample(np.array(c[0].context, np.int64), np.array(c[0].tokens[:1], np.int64)) for c in written]
        batch = self.maker.make(samples)
        logits_BSV, _ = forward(self.model, batch, self.group_of_modality)
        logits_BV = logits_BSV.flatten(0, 1)[batch.probe_tokens_B]
        first_BK = torch.tensor([[choice.tokens[0] for choice in choices] for choices in written])
        return logits_BV.gather(1, first_BK).argmax(1).tolist()
