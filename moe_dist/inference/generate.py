"""Generates tokens from a trained model with a key-value cache. Shape letters: B sequences, N tokens, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moe_dist.errors import ConfigError
from moe_dist.inference.grammar import Grammar, GrammarState
from moe_dist.model.cache import KeyValueCache
from moe_dist.model.transformer import Transformer

_BATCH = 64  # number of prompts per batch; guidance adds a copy of each prompt without its caption


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing tokens.

    Attributes:
        temperature: Divisor of the logits. With 0 the most likely token is always taken.
        top_p: Only tokens in the nucleus are drawn: the smallest set of likeliest tokens whose probabilities, after the
            temperature, sum to at least `top_p` (Holtzman et al., arXiv 1904.09751, section 3.1). 1 allows all tokens.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature={self.temperature}: must be 0 (the most likely token) or more; 1 is the model's own"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must lie above 0 and be at most 1, which leaves all tokens")


def probabilities(logits_BV: Tensor, allowed_BV: Tensor, sampling: Sampling) -> Tensor:
    """Returns each token's probability of being drawn, float64 [B, V]: 0 for tokens outside `allowed_BV` or the nucleus.

    Every row of `allowed_BV` must allow a token. Of equally likely tokens, the one with the lower id comes first.
    """
    scores_BV = logits_BV.to(torch.float64).masked_fill(~allowed_BV, float("-inf"))
    order_BV = scores_BV.argsort(dim=-1, descending=True, stable=True)  # stable, so that the lower id comes first
    if sampling.temperature == 0.0:
        return torch.zeros_like(scores_BV).scatter_(1, order_BV[:, :1], 1.0)
    # The maximum is subtracted before the division, because a small temperature could make scores overflow.
    scores_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)) / sampling.temperature
    sorted_BV = scores_BV.softmax(-1).gather(1, order_BV)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    sorted_BV = torch.where(before_BV < sampling.top_p, sorted_BV, 0.0)
    sorted_BV = sorted_BV / sorted_BV.sum(-1, keepdim=True)
    return torch.zeros_like(scores_BV).scatter_(1, order_BV, sorted_BV)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Draws one token per row, int64 [B]. The token is the lowest id whose cumulative probability exceeds the row's entry
    of `uniform_B`, a number in [0, 1)."""
    cumulative_BV = probabilities_BV.cumsum(-1)
    # Rounding may leave the last cumulative probability below 1, so `uniform_B` is scaled by it.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return (cumulative_BV <= target_B1).sum(-1).clamp_max(probabilities_BV.shape[-1] - 1)


def guided(logits_BV: Tensor, plain_BV: Tensor, guidance: float) -> Tensor:
    """Applies classifier-free guidance: returns plain + guidance x (conditional - plain), where all are log-probabilities.

    With `guidance` 1 the result is the model's own distribution. With a larger value, pictures follow the caption more
    closely. The formula is equation 6 of Ho and Salimans, arXiv 2207.12598, with w = guidance - 1.

    Args:
        plain_BV: Logits of the same sequences without captions. `logits_BV` has the logits with captions.
    """
    conditional, plain = logits_BV.to(torch.float64).log_softmax(-1), plain_BV.to(torch.float64).log_softmax(-1)
    return plain + guidance * (conditional - plain)


class UniformDraws:
    """A stream of uniform random numbers in [0, 1) for each sequence. A stream depends only on the seed and the sequence's
    index, and not on other sequences of the batch."""

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed((seed << 20) + number) for number in numbers]

    def __call__(self) -> Tensor:
        """Returns the next number of each stream, float64 [B]."""
        return torch.stack([torch.rand((), generator=each, dtype=torch.float64) for each in self._generators])


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
