"""Answers multiple-choice questions. The model takes the choice with the highest value of a likelihood measure.

The measure `plain` is the choice's log-likelihood, which favours short choices. The default measure `normalised` is the
log-likelihood divided by the choice's number of tokens.

Without rotations the text of a question does not list the choices. The order of choices then matters only if two choices
have equal values of the measure, because the first of them is taken. With rotations the text lists the choices, and the
question is asked once for each choice, with this choice listed first. A question with rotations counts as right only if the
model answers every rotation right. A model that always takes the second choice therefore gets no rotated question right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np

from moe_dist.errors import DataError
from moe_dist.inference.fact import Codes, Part, Question
from moe_dist.inference.grammar import IMAGE
from moe_dist.inference.likelihood import Continuation, Likelihood, Score, check_lengths
from moe_dist.inference.vocabulary import Vocabulary

Measure = Literal["normalised", "plain"]
MEASURES: tuple[Measure, ...] = ("normalised", "plain")
CONFIDENCE = 0.95
_RESAMPLES = 2000


@dataclass(frozen=True)
class Answered:
    """A question and the choice that the model took in each rotation.

    Attributes:
        taken: For each measure and rotation, the index of the choice that the model took. Indices refer to the order of
            choices in the unrotated question.
    """

    question: Question
    taken: dict[Measure, tuple[int, ...]]

    def right(self, measure: Measure) -> bool:
        """Returns whether the model took the right choice in every rotation."""
        return all(choice == self.question.answer for choice in self.taken[measure])


class Prompts:
    """Encodes questions as token ids, in the form of training documents: a text, or a picture with its caption. If
    `listed` is True, the text of a question lists all choices."""

    def __init__(self, vocabulary: Vocabulary, *, listed: bool) -> None:
        self._vocabulary, self._listed = vocabulary, listed

    def __call__(self, question: Question) -> list[Continuation]:
        """Returns one continuation for each choice: its context is the question, and its tokens are the choice."""
        context = self._context(question)
        return [Continuation(context, self._choice(question, choice)) for choice in question.choices]

    def _context(self, question: Question) -> list[int]:
        naming, finding = isinstance(question.asked, Codes), isinstance(question.choices[0], Codes)
        before = "" if naming or finding else "Question: "
        parts: list[Part] = [question.asked] if isinstance(question.asked, Codes) else [before + question.asked]
        if self._listed:
            texts = [choice for choice in question.choices if isinstance(choice, str)]
            listed: list[Part] = ["; ".join(texts)] if texts else list(question.choices)
            parts = [*listed, *parts] if naming or finding else [*parts, f"\nChoices: {listed[0]}"]
        if not (naming or finding):
            parts.append("\nAnswer:")
        tokens = self._vocabulary.text_prompt("")
        for part in parts:
            tokens += self._tokens(part)
        return [*tokens, self._vocabulary.grammar.begin_id or 0] if finding else tokens

    def _choice(self, question: Question, choice: Part) -> list[int]:
        if isinstance(choice, Codes):
            return self._tokens(choice)[1:-1]  # without marks: the start mark is in the context, the end mark is certain
        return self._tokens(choice if isinstance(question.asked, Codes) else f" {choice}")

    def _tokens(self, part: Part) -> list[int]:
        if isinstance(part, Codes):
            return self._vocabulary.picture(np.array(part.codes, np.int64))
        return self._vocabulary.tokens(part)


Written = list[list[list[Continuation]]]  # indices: question, rotation, choice


def write(questions: Sequence[Question], prompts: Prompts, *, rotations: bool, max_seq_len: int) -> Written:
    """Returns the questions as token ids. With `rotations`, each question is written in every rotation. Raises ConfigError
    if a question is longer than the model supports."""
    written = [
        [prompts(question.rotated(by)) for by in range(len(question.choices) if rotations else 1)] for question in questions
    ]
    check_lengths(flat(written), max_seq_len)  # checked here, because loading the model takes long
    return written


def flat(written: Written) -> list[Continuation]:
    """Returns all continuations in one list, in the order of question, rotation and choice."""
    return [each for of_question in written for turn in of_question for each in turn]


def ask(questions: Sequence[Question], written: Written, likelihood: Likelihood) -> list[Answered]:
    """Returns the model's answers. All ranks must call this function."""
    scores = iter(likelihood(flat(written)))
    answered = []
    for question, of_question in zip(questions, written, strict=True):
        taken: dict[Measure, list[int]] = {measure: [] for measure in MEASURES}
        for by, turn in enumerate(of_question):
            found = [next(scores) for _ in turn]
            for measure in MEASURES:
                taken[measure].append((likeliest(found, turn, measure) + by) % len(turn))
        answered.append(Answered(question, {measure: tuple(each) for measure, each in taken.items()}))
    return answered


def likeliest(scores: Sequence[Score], choices: Sequence[Continuation], measure: Measure) -> int:
    """Returns the index of the choice with the highest value of the measure; on ties, of the first such choice."""
    values = [
        score.nats / len(choice.tokens) if measure == "normalised" else score.nats
        for score, choice in zip(scores, choices, strict=True)
    ]
    return values.index(max(values))  # `index` finds the first maximum


def check_vocabulary(vocabulary: Vocabulary, *, vocab_size: int) -> None:
    """Checks that each token id of the tokenizer is a text token of the data set and is below `vocab_size`. Raises
    DataError if not, because the tokenizer then belongs to another data set."""
    grammar = vocabulary.grammar
    image = grammar.modalities.index(IMAGE) if IMAGE in grammar.modalities else None
    numbers = vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    for token, number in sorted(numbers.items(), key=lambda item: item[1]):
        if number >= vocab_size or grammar.modality_of_id[number] in (-1, image):
            meaning = (
                f"model.vocab_size={vocab_size} is too small for it"
                if number >= vocab_size
                else f"to the data that is {'a picture code' if grammar.modality_of_id[number] == image else 'nothing'}"
            )
            raise DataError(
                f"tokenizer: it gives {token!r} the id {number}, but {meaning}; it is another data set's tokenizer: put "
                "back the one that the data were prepared with (docs/data.md)"
            )


def wilson(right: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Returns Wilson's two-sided score interval (Wilson 1927) for the proportion `right` / `total` of independent
    questions. The interval stays within [0, 1], and is accurate even for few questions."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(right: Sequence[np.ndarray], *, seed: int) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean accuracy over tasks. Resamples each task's questions. `right`
    has one bool array [questions] per task, True for a right answer."""
    rng = np.random.default_rng(seed)
    # The number of right answers in a resample has a binomial distribution.
    means = np.mean([rng.binomial(len(each), each.mean(), _RESAMPLES) / len(each) for each in right], axis=0)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def results(answered: dict[str, list[Answered]], *, seed: int) -> dict[str, object]:
    """Returns each task's accuracy and the mean accuracy over tasks, each with its interval, as values for JSON."""
    tasks = {name: _task(each) for name, each in answered.items()}
    mean: dict[str, object] = {}
    for measure in MEASURES:
        right = [np.array([each.right(measure) for each in of_task]) for of_task in answered.values()]
        accuracy = float(np.mean([each.mean() for each in right]))
        mean[measure] = {"accuracy": accuracy, "interval": list(bootstrap_mean(right, seed=seed))}
    return {"tasks": tasks, "mean": mean}


def _task(answered: Sequence[Answered]) -> dict[str, object]:
    found: dict[str, object] = {
        "questions": len(answered),
        "chance": float(np.mean([1 / len(each.question.choices) for each in answered])),
    }
    for measure in MEASURES:
        right, total = sum(each.right(measure) for each in answered), len(answered)
        found[measure] = {"right": right, "accuracy": right / total, "interval": list(wilson(right, total))}
    found["answers"] = [
        {
            "id": each.question.id,
            "answer": each.question.answer,
            **{name: list(taken) for name, taken in each.taken.items()},
        }
        for each in answered
    ]
    return found
