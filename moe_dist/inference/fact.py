"""Defines facts (something to ask about, and its right answer) and questions (facts with wrong choices)."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Codes:
    """A picture, represented by its codes. A code is an index into the codebook."""

    codes: tuple[int, ...]


Part = str | Codes


@dataclass(frozen=True)
class Fact:
    """Something to ask about, and the right answer.

    Attributes:
        id: Id of the fact, unique within the fact's task. The id does not depend on other facts.
        asked: A text with a question mark, a caption (the question asks for its picture), or a picture (the question asks
            for its caption).
        keys: Texts such as 'lemma:dog' or 'family:1F415'. Facts on different sides (train, validation, test) have no common
            key. A WordNet fact has a key for every lemma of its synsets, so that facts about one synset have common keys.
        wrong: Other answers that are also right or nearly right, so that they must not become wrong choices.
        pool: Name of the set of facts to which the fact belongs. Wrong choices are the right answers of other facts of the
            set.
        closed: All possible answers, if there are few. The wrong choices on every side are then from this tuple.
        trained_on: True if the run was trained on the fact's picture, False if not; None for a fact without a picture.
        side: The side of the fact ('train', 'valid' or 'test'); None if the fact's keys determine the side.
    """

    id: str
    asked: Part
    answer: Part
    keys: frozenset[str]
    wrong: frozenset[Part] = frozenset()
    pool: str = ""
    closed: tuple[str, ...] = ()
    trained_on: bool | None = None
    side: str | None = None


@dataclass(frozen=True)
class Question:
    """A fact with four choices, one of which is right."""

    task: str
    id: str  # `Fact.id`
    asked: Part
    choices: tuple[Part, ...]
    answer: int  # index of the right choice

    def rotated(self, by: int) -> "Question":
        """Returns the same question with its first `by` choices moved to the end."""
        by %= len(self.choices)
        choices = (*self.choices[by:], *self.choices[:by])
        return Question(self.task, self.id, self.asked, choices, (self.answer - by) % len(choices))


def lemma_keys(words: Sequence[str]) -> frozenset[str]:
    """Returns the keys of facts about `words`: one key per word, in lower case and with single spaces."""
    return frozenset("lemma:" + " ".join(word.replace("_", " ").lower().split()) for word in words)
