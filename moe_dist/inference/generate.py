"""Generates tokens from a trained model with a key-value cache. Shape letters: B sequences, N tokens, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.inference.grammar import Grammar, GrammarState
from moe_dist.inference.sampling import Sampling, UniformDraws, draw, guided, probabilities
from moe_dist.model.cache import KeyValueCache
from moe_dist.model.transformer import Transformer

_BATCH = 64  # number of prompts per batch; guidance adds a copy of each prompt without its caption


@dataclass(frozen=True)
class Request:
    """Settings for generating tokens."""

    max_new_tokens: int  # largest number per prompt; a picture starts only if all its tokens fit
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0  # prompt b has its own random stream, with the seed (seed, b)
    one_picture: bool = False  # if True, generation stops after the end mark of a picture
    text_only: bool = False  # if True, no picture is started
    guidance: float = 1.0  # strength of classifier-free guidance (`guided`); a value other than 1 needs `plain` prompts


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_seq_len: int) -> None:
    """Checks that each prompt and its new tokens fit into `max_seq_len`. Raises ConfigError if a prompt does not fit or is
    empty, or `max_new_tokens` is below 1."""
    if not all(prompts) or max_new_tokens < 1:
        raise ConfigError("a prompt must have at least one token, and max_new_tokens must be at least 1")
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > max_seq_len:
        room = max_seq_len - longest
        fix = f"ask for {room} at most, or shorten the prompt" if room > 0 else "shorten the prompt"
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than model.max_seq_len={max_seq_len}, "
            f"the longest the model is made for; {fix}"
        )


class Generator:
    """Continues prompts with one model, whose experts must all be on one device. Puts the model into evaluation mode."""

    def __init__(self, model: Transformer, grammar: Grammar, *, group_of_modality: Sequence[int], max_seq_len: int) -> None:
        self.model, self.grammar, self.max_seq_len = model.eval(), grammar, max_seq_len
        self._device = next(model.parameters()).device
        group_of_id = np.array([*group_of_modality, -1])[grammar.modality_of_id]
        self._group_of_id = torch.from_numpy(group_of_id).to(self._device)
        self._allowed_SV = torch.from_numpy(grammar.allowed_SV)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[int]], request: Request, *, plain: Sequence[Sequence[int]] | None = None
    ) -> list[list[int]]:
        """Returns the new tokens of each prompt. They include the end mark of the document or picture at which generation
        stopped. Costs one host sync per token and batch. Guidance needs `plain`, the prompts without their captions. Raises
        ConfigError: see `check_lengths`."""
        made: list[list[int]] = []
        for first in range(0, len(prompts), _BATCH):
            part = slice(first, first + _BATCH)
            made += self._batch(prompts[part], request, None if plain is None else plain[part], first)
        return made

    def _batch(
        self, prompts: Sequence[Sequence[int]], request: Request, plain: Sequence[Sequence[int]] | None, first: int
    ) -> list[list[int]]:
        every = [list(prompt) for prompt in [*prompts, *(plain or [])]]
        check_lengths(every, request.max_new_tokens, self.max_seq_len)
        count = len(prompts)
        uniform = UniformDraws(request.seed, range(first, first + count))
        made: list[list[int]] = [[] for _ in prompts]
        going = [True] * count
        cache = self.model.make_cache(len(every), max(map(len, every)) + request.max_new_tokens)
        logits_BV = self._prefill(every, cache)
        lengths = torch.tensor([len(each) for each in every], device=self._device)
        for number in range(request.max_new_tokens):
            if plain is not None:
                logits_BV = guided(logits_BV[:count], logits_BV[count:], request.guidance)
            states = [self._state([*prompts[b], *made[b]], request, number) for b in range(count)]
            chances_BV = probabilities(logits_BV.cpu(), self._allowed_SV[states], request.sampling)  # host sync
            tokens = draw(chances_BV, uniform()).tolist()
            for b in range(count):
                if going[b]:
                    made[b].append(tokens[b])
                    ends = tokens[b] == self.grammar.eos_id
                    going[b] = not (ends or (request.one_picture and tokens[b] == self.grammar.end_id))
            if not any(going) or number + 1 == request.max_new_tokens:
                break
            logits_BV = self._step(tokens, going, lengths + number, 1 if plain is None else 2, cache)
        return made

    def _state(self, tokens: Sequence[int], request: Request, number: int) -> GrammarState:
        state = self.grammar.state(tokens, request.max_new_tokens - number)
        return GrammarState.TEXT_ONLY if request.text_only and state is GrammarState.TEXT else state

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KeyValueCache) -> Tensor:
        """Runs all prompts as one batch, padded at the end. Returns the logits after each prompt's last token, [B, V]."""
        longest = max(map(len, prompts))
        padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=self._device)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._device)
        positions = torch.arange(longest, device=self._device).expand_as(padded)
        group_BN = torch.where(positions <= last_B[:, None], self._group_of_id[padded], -1)
        logits = self.model.forward_cached(padded, positions, group_BN, cache)
        return logits[torch.arange(len(prompts), device=self._device), last_B]

    def _step(self, tokens: list[int], going: list[bool], positions_B: Tensor, copies: int, cache: KeyValueCache) -> Tensor:
        """Appends one token to each sequence and to the sequence's copy without caption. Returns the logits after this
        token. Finished sequences get padding, so that the batch keeps its shape."""
        tokens_B = torch.tensor(tokens * copies, device=self._device)
        group_B = torch.where(torch.tensor(going * copies, device=self._device), self._group_of_id[tokens_B], -1)
        return self.model.forward_cached(tokens_B[:, None], positions_B[:, None], group_B[:, None], cache)[:, 0]
