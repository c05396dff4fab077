"""Runs a generation task: continue a text, draw a caption's picture, or write a picture's caption."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moe_dist.errors import ConfigError
from moe_dist.inference.generate import Generator, Request
from moe_dist.inference.sampling import Sampling
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary, picture_of


@dataclass(frozen=True)
class Task:
    """Arguments of a `Generator` call: prompts, settings, and, for guidance, the prompts without captions (`plain`)."""

    prompts: list[list[int]]
    request: Request
    plain: list[list[int]] | None = None


@dataclass(frozen=True)
class GeneratedSample:
    """The tokens that were generated for one prompt, and their meaning as text and pictures."""

    tokens: list[int]  # ids of the new tokens
    modalities: list[str]  # modality of each new token
    text: str  # text of the new tokens
    pictures: list[Image.Image]  # pictures that end in the new tokens


def draw_captions(
    vocabulary: Vocabulary, captions: Sequence[str], *, sampling: Sampling, seed: int, guidance: float
) -> Task:
    """Makes the task of drawing a picture of each caption. Raises ConfigError or DataError if the data set's tokenizer or
    codebook is missing or damaged, or `guidance` is below 0."""
    if not 0.0 <= guidance < float("inf"):
        raise ConfigError(f"guidance={guidance}: must be 0 (no caption) or more; 1 is the model's own")
    cells = len(vocabulary.codebook) and vocabulary.grammar.cells
    prompts = [vocabulary.drawing_prompt(caption) for caption in captions]
    # With guidance 1 the prompts without captions have no effect.
    plain = None if guidance == 1.0 else [vocabulary.drawing_prompt("")] * len(prompts)
    return Task(prompts, Request(cells + 1, sampling, seed, one_picture=True, guidance=guidance), plain)


def run_task(task: Task, generator: Generator, vocabulary: Vocabulary) -> list[GeneratedSample]:
    """Generates one sample per prompt, in the order of the prompts."""
    grammar = vocabulary.grammar
    made = generator(task.prompts, task.request, plain=task.plain)
    samples = []
    for prompt, tokens in zip(task.prompts, made, strict=True):
        before = len(grammar.pictures(prompt))
        codes = grammar.pictures([*prompt, *tokens])[before:]
        samples.append(
            GeneratedSample(
                tokens=tokens,
                modalities=[grammar.modalities[grammar.modality_of_id[token]] for token in tokens],
                text=vocabulary.text(tokens),
                pictures=[picture_of(each, vocabulary.codebook) for each in codes],
            )
        )
    return samples


def choose_captions(heldout: Sequence[HeldoutPicture], count: int, *, starting: str, seed: int) -> list[str]:
    """Returns `count` distinct random captions of `heldout`, or all if there are fewer, in the order of the data. Raises
    ConfigError if no caption begins with `starting`."""
    known = [each for each in dict.fromkeys(each.caption for each in heldout) if each.startswith(starting)]
    if not known:
        raise ConfigError(
            f"--starting {starting!r}: none of the held-out captions does; one of them is {heldout[0].caption!r}"
        )
    chosen = np.random.default_rng(seed).permutation(len(known))[:count]
    return [known[number] for number in sorted(chosen.tolist())]
