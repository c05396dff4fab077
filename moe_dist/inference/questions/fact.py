"""Facts and questions. A fact is a question with its right answer; a question adds wrong answers."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Codes:
    """A picture as codes; code 0 is the first of the codebook."""

    codes: tuple[int, ...]


Part = str | Codes


@dataclass(frozen=True)
class Fact:
    """A question with its answer, from a package.

    Attributes:
        id: Unique within the task, and independent of other facts.
        asked: A text with a question mark, the caption to draw, or the picture to name.
        keys: Keys such as 'lemma:dog' or 'family:1F415', which no fact of another side may share. A WordNet fact names
            every lemma of its synsets, so two facts about one synset have keys in common.
        wrong: Answers that are also right, or nearly right, and so are never offered as wrong choices.
        pool: Facts of one pool use each other's answers as wrong choices.
        closed: All possible answers, if they are few; wrong choices are then taken from them, whatever the side.
        trained_on: For a picture, True if the run was trained on it; None for facts without a picture.
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
    """A fact with four choices, one of them right."""

    task: str
    id: str  # id of the fact
    asked: Part
    choices: tuple[Part, ...]
    answer: int  # index of the right choice

    def rotated(self, by: int) -> "Question":
        """The same question with the first `by` choices moved to the end."""
        by %= len(self.choices)
        choices = (*self.choices[by:], *self.choices[:by])
        return Question(self.task, self.id, self.asked, choices, (self.answer - by) % len(choices))


def lemma_keys(words: Sequence[str]) -> frozenset[str]:
    """Keys of words, in lower case and with single spaces."""
    return frozenset("lemma:" + " ".join(word.replace("_", " ").lower().split()) for word in words)
