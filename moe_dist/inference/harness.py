"""Makes a trained model usable by EleutherAI's lm-evaluation-harness (package lm_eval, in the extra `evaluate`).

This file can be imported only if lm_eval is installed. The model runs in one process.
"""

from collections.abc import Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator, Request, Sampling
from moe_dist.inference.likelihood import Continuation, Likelihood
from moe_dist.inference.vocabulary import Vocabulary

_MAX_NEW_TOKENS = 256  # largest number of new tokens if a task sets no limit


class HarnessModel(LM):
    """A trained model with the three methods that the harness requires.

    If a context does not fit into `max_seq_len`, its first tokens are left out, but its begin mark is kept.
    `likelihood` and `generator` must use the same model.
    """

    def __init__(
        self, likelihood: Likelihood, generator: Generator, vocabulary: Vocabulary, *, max_seq_len: int, seed: int = 0
    ) -> None:
        super().__init__()
        self._likelihood, self._generator, self._vocabulary = likelihood, generator, vocabulary
        self._max_seq_len, self._seed = max_seq_len, seed

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns, for each (context, continuation), the continuation's log-likelihood and whether greedy decoding of the
        context produces the continuation."""
        continuations = [self._pair(*request.args) for request in requests]
        scores = [(score.nats, score.greedy) for score in self._likelihood(continuations)]
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, score)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns each text's log-likelihood, summed over windows of at most `max_seq_len` tokens (see `_windows`)."""
        windows = [self._windows(request.args[0]) for request in requests]
        scores = iter(self._likelihood([window for of_text in windows for window in of_text]))
        sums = [sum((next(scores).nats for _ in of_text), 0.0) for of_text in windows]
        for request, nats in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, nats)
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns, for each (context, options), the generated text up to the first stop string in the option `until`.
        Raises ConfigError if an option is not supported."""
        texts = []
        for request in tqdm(requests, desc="generate", disable=len(requests) < 2):
            context, options = cast("tuple[str, dict[str, Any]]", request.args)
            text = self._generated(context, dict(options))
            self.cache_hook.add_partial("generate_until", request.args, text)  # a restarted harness reuses this result
            texts.append(text)
        return texts

    def _generated(self, context: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        room = int(options.pop("max_gen_toks", options.pop("max_new_tokens", _MAX_NEW_TOKENS)))
        temperature = float(options.pop("temperature", 0.0)) if options.pop("do_sample", True) else 0.0
        top_p = float(options.pop("top_p", 1.0))
        if options:
            raise ConfigError(
                f"generation_kwargs {', '.join(options)}: not known here; known are until, max_gen_toks, do_sample, "
                "temperature and top_p: take the others out of the task"
            )
        room = min(room, self._max_seq_len - 1)  # leaves space for at least one token of context
        prompt = self._cut(self._vocabulary.text_prompt(context), self._max_seq_len - room)
        wanted = Request(room, Sampling(temperature, top_p), self._seed, text_only=True)
        text = self._vocabulary.text(self._generator([prompt], wanted)[0])
        for stop in until:
            text = text.partition(stop)[0] if stop else text
        return text

    def _pair(self, context: str, continuation: str) -> Continuation:
        # Spaces at the context's end move to the continuation, because byte-level BPE joins a space with the next word.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        tokens = self._vocabulary.tokens(continuation)
        if len(tokens) > self._max_seq_len:
            raise ConfigError(
                f"a choice of the task is {len(tokens)} tokens, more than model.max_seq_len={self._max_seq_len}, the "
                "longest the model is made for; take another task"
            )
        prompt = self._vocabulary.text_prompt(context)
        return Continuation(self._cut(prompt, self._max_seq_len + 1 - len(tokens)), tokens)

    def _windows(self, text: str) -> list[Continuation]:
        """Returns windows that together score each token of a text once, with as much context as fits. An empty text has no
        windows."""
        prompt = self._vocabulary.text_prompt(text)
        begin, tokens = prompt[:1], prompt[1:]
        windows = []
        for first in range(0, len(tokens), self._max_seq_len):
            scored = tokens[first : first + self._max_seq_len]
            before = [*begin, *tokens[:first]][-(self._max_seq_len + 1 - len(scored)) :]
            windows.append(Continuation(before, scored))
        return windows

    @staticmethod
    def _cut(prompt: Sequence[int], length: int) -> list[int]:
        return list(prompt) if len(prompt) <= length else [*prompt[:1], *prompt[len(prompt) - length + 1 :]]
