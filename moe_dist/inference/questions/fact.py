"""A fact is a question with its right answer; a question has wrong answers beside it."""

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
    """What a package says.

    Attributes:
        id: Unique within its task, and the same whatever else is asked.
        asked: A text with its question mark, the caption to draw, or the picture to be named.
        answer: The right answer.
        keys: What no fact of another side may share: 'lemma:dog', 'family:1F415'. A WordNet fact names every lemma of its
            synsets, so that two facts about one synset have keys in common.
        wrong: Answers that are right as well, or nearly: never choices beside this one.
        pool: Facts of one pool lend each other their answers as wrong ones.
        closed: All answers there are, where they are few: wrong ones come from these, and need no side.
        trained_on: For pictures: whether the run was trained on it; None where that is not known of any fact of the task.
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
        task: Whose.
        id: Of the fact.
        answer: Index of the right one among the choices.
    """

    task: str
    id: str
    asked: Part
    choices: tuple[Part, ...]
    answer: int

    def rotated(self, by: int) -> "Question":
        """The same with the choices moved `by` places to the front, and the first ones to the end."""
        by %= len(self.choices)
        choices = (*self.choices[by:], *self.choices[:by])
        return Question(self.task, self.id, self.asked, choices, (self.answer - by) % len(choices))


def lemma_keys(words: Sequence[str]) -> frozenset[str]:
    """Keys of words: without case, and with one kind of space."""
    return frozenset("lemma:" + " ".join(word.replace("_", " ").lower().split()) for word in words)
