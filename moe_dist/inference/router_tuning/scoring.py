"""Makes samples for router tuning from answered questions: token ids, a text to embed, and whether the answer was right."""

from collections.abc import Sequence

import numpy as np

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Question
from moe_dist.inference.likelihood import Continuation
from moe_dist.inference.multiple_choice import Answered, Measure, Written
from moe_dist.train.router_tuning.samples import Scored, TuningSample


def embedded_text(question: Question, *, listed: bool) -> str:
    """Returns the text to embed: the text of the question and, if `listed`, the texts of its choices. Pictures are left
    out. Raises ConfigError if no text is left."""
    parts = [question.asked, *(question.choices if listed else ())]
    text = "; ".join(part for part in parts if isinstance(part, str))
    if not text:
        raise ConfigError(
            f"--tasks {question.task}: its questions are pictures alone, of which a sentence embedder knows nothing; leave "
            "it out, or take --rotations, by which a question lists its choices",
            see="docs/router-tuning.md",
        )
    return text


def first_tokens(turn: Sequence[Continuation], right: int) -> np.ndarray:
    """Returns the distinct first tokens of the choices, with the first token of the choice `right` first. Returns [-1] if a
    wrong choice begins with the same token as the right choice, because the first token then does not identify the right
    choice."""
    first = [each.tokens[0] for each in turn]
    own = first.pop(right)
    return np.array([-1] if own in first else [own, *dict.fromkeys(first)], np.int64)


def scored_samples(answered: Sequence[Answered], written: Written, measure: Measure, *, listed: bool) -> list[Scored]:
    """Returns one sample per question, in the order of the questions: the unrotated question with its right choice. `right`
    is True if the model took the right choice in every rotation."""
    samples = []
    for each, turns in zip(answered, written, strict=True):
        question, (context, answer) = each.question, turns[0][each.question.answer]
        choices = first_tokens(turns[0], question.answer)
        sample = TuningSample(np.array(context, np.int64), np.array(answer, np.int64), choices)
        text = embedded_text(question, listed=listed)
        samples.append(Scored(question.task, question.id, text, sample, each.right(measure)))
    return samples
