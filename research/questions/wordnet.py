"""Makes facts from WordNet's files `data.noun`, `data.adj` and `index.noun` (format: wndb(5WN)).

Facts about nouns use only some of the noun synsets, because the others would make questions that nobody can answer. A
synset must be the first sense of its first word, and this word must occur in WordNet's tagged text.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from moe_dist.errors import DataError
from moe_dist.inference.fact import Fact, lemma_keys

LONGEST_GLOSS = 120  # largest length of a definition in a question, in characters
_Parsed = TypeVar("_Parsed")
_HYPERNYM, _ANTONYM = "@", "!"
# WordNet's lexicographer files of nouns (lexnames(5WN)), from number 04 on. Number 03, "Tops", is not a category.
_CATEGORY_NAMES = """
act animal artifact attribute body cognition communication event feeling food group location motive object person
phenomenon plant possession process quantity relation shape state substance time
"""
CATEGORIES = dict(enumerate(_CATEGORY_NAMES.split(), start=4))


@dataclass(frozen=True)
class Synset:
    """One synset: a meaning, and the words with that meaning."""

    lexicographer: int  # number of the lexicographer file; for a noun it is a key of CATEGORIES, or 3
    words: tuple[str, ...]  # words, with spaces instead of underscores
    # (symbol, offset of the target synset, its part of speech, source word, target word). A word is given by its number,
    # which begins with 1; the number 0 stands for all words.
    pointers: tuple[tuple[str, str, str, int, int], ...]
    gloss: str  # the definition, without examples


class WordNet:
    """Makes facts from the WordNet files in one folder. Reads a file when it is first needed; reading nouns takes a second.

    Raises:
        DataError: raised by any method if a file is missing or not in WordNet's format.
    """

    FILES = ("data.noun", "index.noun", "data.adj")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def definitions(self) -> list[Fact]:
        """Returns facts that ask for the word with a given definition."""
        return [
            Fact(
                f"n{offset}",
                f"Which word means: {synset.gloss}?",
                synset.words[0],
                lemma_keys(synset.words),
                frozenset(synset.words),
            )
            for offset, synset in self._common.items()
            if len(synset.gloss) <= LONGEST_GLOSS and not _says(synset.gloss, synset.words)
        ]

    def hypernyms(self) -> list[Fact]:
        """Returns facts that ask for a noun's nearest hypernym. Its other hypernyms do not occur as wrong choices."""
        facts = []
        for offset, synset in self._common.items():
            parent = next(iter(self._parents(synset)), None)
            if parent is None or _says(self._nouns[parent].words[0], synset.words):
                continue
            above = self._nouns[parent]
            facts.append(
                Fact(
                    f"n{offset}",
                    f'What is "{synset.words[0]}" a kind of?',
                    above.words[0],
                    lemma_keys([*synset.words, *above.words]),
                    frozenset(word for each in [offset, *self._ancestors(offset)] for word in self._nouns[each].words),
                )
            )
        return facts

    def antonyms(self) -> list[Fact]:
        """Returns facts that ask for the opposite of an adjective. The answer is the first opposite in the file. Other
        opposites, of any sense of the adjective, do not occur as wrong choices."""
        pairs = [
            (synset, synset.words[source - 1], self._find(self._adjectives, other, "data.adj"), target)
            for synset in self._adjectives.values()
            for symbol, other, part, source, target in synset.pointers
            if symbol == _ANTONYM and part == "a" and source and target
        ]
        right: dict[str, set[str]] = {}
        for synset, word, opposite, _ in pairs:
            right.setdefault(word, set()).update(synset.words, opposite.words)
        facts: dict[str, Fact] = {}
        for synset, word, opposite, target in pairs:
            if word not in facts:
                facts[word] = Fact(
                    word,
                    f'What is the opposite of "{word}"?',
                    opposite.words[target - 1],
                    lemma_keys([*synset.words, *opposite.words]),
                    frozenset(right[word]),
                )
        return list(facts.values())

    def categories(self) -> list[Fact]:
        """Returns facts that ask for the category of a noun, one of CATEGORIES."""
        closed = tuple(CATEGORIES.values())
        return [
            Fact(
                f"n{offset}",
                f'What kind of thing is "{synset.words[0]}"?',
                CATEGORIES[synset.lexicographer],
                lemma_keys(synset.words),
                closed=closed,
            )
            for offset, synset in self._common.items()
            if synset.lexicographer in CATEGORIES
        ]

    @cached_property
    def _common(self) -> dict[str, Synset]:
        """Returns the noun synsets of facts about nouns (see the top of this file), by offset."""
        first = dict(self._parsed("index.noun", _first_sense))
        return {
            offset: synset
            for offset, synset in self._nouns.items()
            if first.get(synset.words[0].replace(" ", "_").lower()) == offset
        }

    @cached_property
    def _nouns(self) -> dict[str, Synset]:
        return dict(self._synsets("data.noun"))

    @cached_property
    def _adjectives(self) -> dict[str, Synset]:
        return dict(self._synsets("data.adj"))

    def _parents(self, synset: Synset) -> list[str]:
        parents = [other for symbol, other, part, *_ in synset.pointers if symbol == _HYPERNYM and part == "n"]
        for parent in parents:
            self._find(self._nouns, parent, "data.noun")
        return parents

    def _ancestors(self, offset: str) -> list[str]:
        found: dict[str, None] = {}
        stack = self._parents(self._nouns[offset])
        while stack:
            each = stack.pop()
            if each not in found:
                found[each] = None
                stack.extend(self._parents(self._nouns[each]))
        return list(found)

    def _find(self, synsets: Mapping[str, Synset], offset: str, name: str) -> Synset:
        if offset not in synsets:
            raise DataError(f"{self._folder / name}: points to synset {offset}, which it has not; take a whole WordNet")
        return synsets[offset]

    def _synsets(self, name: str) -> Iterator[tuple[str, Synset]]:
        return self._parsed(name, _synset)

    def _parsed(self, name: str, parse: Callable[[str], _Parsed]) -> Iterator[_Parsed]:
        """Yields the parsed lines of a file, except the lines of the licence, which begin with a space."""
        path = self._folder / name
        number = 0
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):  # noqa: B007
                    if line.strip() and not line.startswith(" "):
                        yield parse(line)
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{path}: line {number} is not in WordNet's format ({error}); install it again") from error


def _synset(line: str) -> tuple[str, Synset]:
    """Returns the offset and the synset in a line of a file data.*."""
    head, _, gloss = line.partition("|")
    fields = head.split()
    words_end = 4 + 2 * int(fields[3], 16)
    pointers = [fields[at : at + 4] for at in range(words_end + 1, words_end + 1 + 4 * int(fields[words_end]), 4)]
    return fields[0], Synset(
        int(fields[1]),
        tuple(word.partition("(")[0].replace("_", " ") for word in fields[4:words_end:2]),
        tuple((symbol, to, part, int(ends[:2], 16), int(ends[2:], 16)) for symbol, to, part, ends in pointers),
        gloss.partition(";")[0].strip(),
    )


def _first_sense(line: str) -> tuple[str, str | None]:
    """Returns the lemma in a line of index.*, and the offset of the lemma's first sense. The offset is None if the lemma is
    not in tagged text."""
    lemma, *fields = line.split()
    pointers = int(fields[2])
    return lemma, fields[5 + pointers] if int(fields[4 + pointers]) else None


def _says(text: str, words: tuple[str, ...]) -> bool:
    """Returns whether a text contains one of the words. Such a text gives the answer away."""
    padded = f" {''.join(c if c.isalnum() else ' ' for c in text.lower())} "
    return any(f" {word.lower()} " in padded for word in words)
