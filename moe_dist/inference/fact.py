"""Facts and questions. A fact is a thing to ask about with its right answer; a question is a fact with wrong choices."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_CHOICES = 4


@dataclass(frozen=True)
class Codes:
    """A picture as codes, which are indices into the codebook."""

    codes: tuple[int, ...]


Part = str | Codes


@dataclass(frozen=True)
class Fact:
    """A thing to ask about, and the right answer.

    Attributes:
        id: Id of the fact, unique within the fact's task. The id does not depend on other facts.
        asked: A text with a question mark, a caption whose picture is asked for, or a picture whose caption is asked for.
        keys: Texts such as 'lemma:dog' or 'family:1F415'. Facts on different sides (train, validation, test) have no key in
            common. A WordNet fact has a key for every lemma of its synsets; facts about one synset thus have common keys.
        wrong: Other answers that are right or nearly right, and must therefore not become wrong choices.
        pool: Name of the set of facts to which the fact belongs. The wrong choices are right answers of other facts of the
            pool.
        closed: All possible answers, if there are few; the wrong choices on every side are then taken from `closed`.
        trained_on: True if the run was trained on the fact's picture, False if not; None for a fact without a picture.
        side: The side of the fact ('train', 'valid' or 'test'); None if its keys decide.
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
