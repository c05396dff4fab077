"""Writes files in WordNet's format, with made-up words."""

from collections.abc import Mapping, Sequence
from pathlib import Path

LICENCE = "  1 This line is part of a licence.  \n"


def offset_of(number: int) -> str:
    return f"{1740 + 100 * number:08}"


def write_wordnet(
    folder: Path,
    nouns: Sequence[Sequence[str]],
    opposites: Sequence[tuple[str, str]] = (),
    *,
    uncounted: Sequence[str] = (),
) -> Path:
    """Writes synsets. Noun synset i has the words nouns[i], category 4 + i % 25 and the gloss 'gloss number i', and is a
    kind of synset (i - 1) // 2. Each word's first sense is its first synset. The words in `uncounted` occur in no text."""
    folder.mkdir(parents=True, exist_ok=True)
    data, senses = [], {}
    for number, words in enumerate(nouns):
        pointers = f"001 @ {offset_of((number - 1) // 2)} n 0000" if number else "000"
        listed = " ".join(f"{word.replace(' ', '_')} 0" for word in words)
        gloss = f"gloss number {number}; an example"
        data.append(f"{offset_of(number)} {4 + number % 25:02} n {len(words):02x} {listed} {pointers} | {gloss}")
        for word in words:
            senses.setdefault(word.replace(" ", "_").lower(), []).append(offset_of(number))
    (folder / "data.noun").write_text(LICENCE + "".join(f"{line}  \n" for line in data))
    (folder / "index.noun").write_text(LICENCE + _index(senses, {word.replace(" ", "_") for word in uncounted}))
    adjectives = []
    for number, pair in enumerate(opposites):
        for turn, word in enumerate(pair):
            other = offset_of(2 * number + 1 - turn)
            adjectives.append(
                f"{offset_of(2 * number + turn)} 00 a 01 {word}(a) 0 001 ! {other} a 0101 | quality {2 * number + turn}"
            )
    (folder / "data.adj").write_text(LICENCE + "".join(f"{line}  \n" for line in adjectives))
    return folder


def _index(senses: Mapping[str, Sequence[str]], uncounted: set[str]) -> str:
    return "".join(
        f"{lemma} n {len(offsets)} 1 @ {len(offsets)} {0 if lemma in uncounted else 1} {' '.join(offsets)}  \n"
        for lemma, offsets in sorted(senses.items())
    )
