"""A fact is a question with its right answer; a question adds wrong answers."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Codes:
    """A picture, as codes counted from the codebook's first."""

    codes: tuple[int, ...]


Part = str | Codes


@dataclass(frozen=True)
class Fact:
    """A question with its answer, from a package.

    Attributes:
        id: Unique within its task, and independent of other facts.
        asked: A text with its question mark, the caption to draw, or the picture to name.
        answer: The right answer.
        keys: Keys such as 'lemma:dog' or 'family:1F415', which no fact of another side may share. A WordNet fact names
            every lemma of its synsets, so two facts about one synset have keys in common.
        wrong: Answers that are also right, or nearly so: never offered as wrong choices.
        pool: Facts of one pool use each other's answers as wrong choices.
        closed: All possible answers, if they are few: wrong choices come from these, from any side.
        trained_on: For pictures: whether the run was trained on it; None if unknown, then for all facts of the task.
    """

    id: str
    asked: Part
    answer: Part
    keys: frozenset[str]
    wrong: frozenset[Part] = frozenset()
    pool: str = ""
    closed: tuple[str, ...] = ()
    trained_on: bool | None = None


@dataclass(frozen=True)
class Question:
    """Four choices, one of them right.

    Attributes:
        task: Name of its task.
        id: Id of the fact.
        answer: Index of the right choice.
    """

    task: str
    id: str
    asked: Part
    choices: tuple[Part, ...]
    answer: int

    def rotated(self, by: int) -> "Question":
        """The same question with the first `by` choices moved to the end."""
        by %= len(self.choices)
        choices = (*self.choices[by:], *self.choices[:by])
        return Question(self.task, self.id, self.asked, choices, (self.answer - by) % len(choices))


def lemma_keys(words: Sequence[str]) -> frozenset[str]:
    """Keys of words, in lower case and with single spaces."""
    return frozenset("lemma:" + " ".join(word.replace("_", " ").lower().split()) for word in words)
