"""Generates with a hosted model through the family's own `generate` and its caches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator, Request, UniformDraws, check_lengths, draw, probabilities


class FamilyGenerator(Generator):
    """Continues one prompt at a time, because some families do not ignore padding. Uses the grammar and the random draws of
    `Generator`. Does not support guidance."""

    def _batch(
        self, prompts: Sequence[Sequence[int]], request: Request, plain: Sequence[Sequence[int]] | None, first: int
    ) -> list[list[int]]:
        if plain is not None:
            raise ConfigError("--guidance: models of transformers are not guided; set --guidance 1")
        check_lengths(prompts, request.max_new_tokens, self.max_seq_len)
        return [self._continued(prompt, request, first + number) for number, prompt in enumerate(prompts)]

    def _continued(self, prompt: Sequence[int], request: Request, number: int) -> list[int]:
        family_config = self.model.family.config  # pyright: ignore[reportAttributeAccessIssue]
        if {getattr(family_config, f"{kind}_token_id", None) for kind in ("image", "video")} & set(prompt):
            raise ConfigError(
                "--prompt: has the placeholder of a picture, but generate reads no pictures; export the run "
                "(moe-dist export-hf), and use transformers with the processor (docs/how-to/pictures.md)"
            )
        uniform = UniformDraws(request.seed, [number])

        def choose(ids_1N: Tensor, scores_1V: Tensor) -> Tensor:
            tokens = ids_1N[0].tolist()  # host sync
            state = self._state(tokens, request, len(tokens) - len(prompt))
            chances_1V = probabilities(scores_1V.cpu(), self._allowed_SV[[state]], request.sampling)
            token_11 = draw(chances_1V, uniform()).to(scores_1V.device)[:, None]
            return torch.full_like(scores_1V, float("-inf")).scatter(1, token_11, 0.0)

        ends = [self.grammar.eos_id, *([self.grammar.end_id] if request.one_picture else [])]
        ids_1N = torch.tensor([prompt], device=self._device)
        model: Any = self.model
        with model.generating(self._group_of_id) as family:
            made_1N = family.generate(
                ids_1N,
                attention_mask=torch.ones_like(ids_1N),
                logits_processor=LogitsProcessorList([choose]),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=self.grammar.eos_id,
            )
        return made_1N[0, len(prompt) :].tolist()
