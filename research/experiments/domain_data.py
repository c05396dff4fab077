"""Makes the data of the experiment mole-2: questions in several alphabets that share no token. The answers in different
alphabets contradict each other.

    python -m research.experiments.domain_data --out .cache/data/domains

Each domain has an alphabet: its own token ids for fillers, items and a question mark. Item i is the same item in each
alphabet, because the base model is trained to translate an item of one alphabet into another alphabet. The base model also
learns which tokens belong to one alphabet, because it is trained on texts of a single alphabet:

    texts       five tokens of one alphabet, drawn at random
    parallel    filler_a item_a(i) filler_a ask_b   item_b(i)
    DOMAIN      filler_d item_d(i) filler_d ask_d   item_d(rule_d(i))

The rule of a domain is a permutation of the items. Any two rules differ at every item, and no rule maps an item to itself.
So the answers contradict each other and the base model, and each token of a document shows the document's domain. In a
question, only the answer is scored. In a text, all tokens but the first are scored.

Held-out documents have fillers that no training document of the same item has. Held-out documents of `parallel` also have
triples (alphabet, other alphabet, item) that no training document has. A model that answers them has learnt that the
alphabets share their items.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from moe_dist.data.baselines import count_baselines
from moe_dist.data.prepare import renamed_when_complete
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, SourceSection, write_manifest
from moe_dist.runtime.command_line import reports_errors, run_command
from research.experiments.instructed import Document, check_new, write_split

DOMAINS = ("north", "east", "south", "west", "up", "down", "left", "right")
PARALLEL, TEXTS = "parallel", "texts"
FILLERS, PLACES = 32, 2  # number of fillers of an alphabet, and number of fillers in a document
FIRST = 2  # first id of the first alphabet; the ids before it are padding and end-of-document
HELD_OUT = 8  # one in this many pairs (fillers, item), and triples (alphabet, other alphabet, item), is held out
LICENCE = "Apache-2.0"  # licence of the generated data


@dataclass(frozen=True)
class Alphabet:
    """The token ids of a domain: question mark, fillers, items."""

    ask: int
    items: int

    @property
    def end(self) -> int:
        return self.item(self.items)

    def filler(self, number: int) -> int:
        return self.ask + 1 + number

    def item(self, number: int) -> int:
        return self.ask + 1 + FILLERS + number


@dataclass(frozen=True)
class Asked:
    """A question: the item, the fillers around it, the domain of the question and the domain of the answer."""

    item: int
    fillers: tuple[int, int]
    asked: int
    answered: int


def alphabets(items: int) -> list[Alphabet]:
    """Returns the alphabet of each domain. Alphabets follow each other without gaps."""
    width = 1 + FILLERS + items
    return [Alphabet(FIRST + number * width, items) for number in range(len(DOMAINS))]


def rules(items: int, *, seed: int) -> np.ndarray:
    """Returns for each domain its answer to each item, int64 [domains, items]. For each item, the answers of any two
    domains differ, and no answer is the item itself."""
    rng = np.random.default_rng((seed, items))
    taken = [np.arange(items)]
    while len(taken) <= len(DOMAINS):
        drawn = rng.permutation(items)
        if not any((drawn == other).any() for other in taken):  # for the last rule, true in about one of thousands of draws
            taken.append(drawn)
    return np.stack(taken[1:])


def document(question: Asked, answer: int, every: Sequence[Alphabet]) -> Document:
    """Writes a question and its answer, each in the alphabet of its domain. `answer` is the number of an item."""
    of, to = every[question.asked], every[question.answered]
    before, after = (of.filler(number) for number in question.fillers)
    tokens = np.array([before, of.item(question.item), after, to.ask, to.item(answer)], np.int64)
    return tokens, np.arange(len(tokens)) < len(tokens) - 1


def text(alphabet: Alphabet, rng: np.random.Generator) -> Document:
    """Draws random tokens of one alphabet as a text."""
    tokens = rng.integers(alphabet.ask, alphabet.end, PLACES + 3)
    return tokens, np.arange(len(tokens)) < 1


@reports_errors()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path(".cache/data/domains"),
    items: Annotated[int, typer.Option(min=4 * len(DOMAINS), help="Items of an alphabet.")] = 64,
    questions: Annotated[int, typer.Option(min=2, help="Training questions of each domain.")] = 28_000,
    parallel: Annotated[int, typer.Option(min=2, help="Training documents of each source of the base model.")] = 96_000,
    heldout: Annotated[int, typer.Option(min=2, help="Held-out questions of each source.")] = 1600,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rules and of the documents.")] = 0,
) -> None:
    """Make the data: the sources texts and parallel, and for each domain a source DOMAIN, and a larger DOMAIN-twice."""
    made = make(out, items=items, questions=questions, parallel=parallel, heldout=heldout, seed=seed)
    print(", ".join(f"{name} {source.train.documents}" for name, source in made.sources.items()))


def make(out: Path, *, items: int, questions: int, parallel: int, heldout: int, seed: int) -> Manifest:
    """Makes the folder.

    Raises:
        ConfigError: `out` exists, or there are fewer different questions than requested.
    """
    check_new(out)
    answers, every = rules(items, seed=seed), alphabets(items)
    numbers = range(len(DOMAINS))
    across = [(asked, answered) for asked in numbers for answered in numbers if asked != answered]
    within = [(number, number) for number in numbers]

    def drawn(pairs: Sequence[tuple[int, int]], side: str, count: int) -> list[Asked]:
        rng = np.random.default_rng((seed, len(pairs), pairs[0][0], side == "train"))
        return list(_drawn(pairs, items, side, count=count, rng=rng))

    asked = {
        "train": drawn([*across, *within], "train", parallel),
        "valid": drawn(across, "valid", heldout),
    }
    documents = {PARALLEL: {side: [document(q, q.item, every) for q in questions] for side, questions in asked.items()}}
    rng = np.random.default_rng((seed, 0))
    counts = {"train": parallel, "valid": heldout}
    documents[TEXTS] = {
        side: [text(every[number % len(every)], rng) for number in range(count)] for side, count in counts.items()
    }
    for number, domain in enumerate(DOMAINS):
        sides = {
            side: [document(q, int(answers[number, q.item]), every) for q in drawn([(number, number)], side, count)]
            for side, count in (("train", 2 * questions), ("valid", heldout))
        }
        documents |= {domain: {**sides, "train": sides["train"][:questions]}, f"{domain}-twice": sides}
    return _written(out, documents, every)


def _drawn(
    pairs: Sequence[tuple[int, int]], items: int, side: str, *, count: int, rng: np.random.Generator
) -> Iterator[Asked]:
    """Draws `count` different questions of one side, in random order. In each round, every pair of domains gets one
    question about each item."""
    places = [(*pair, item) for pair in pairs for item in range(items) if _may_ask(*pair, item, side)]
    every = list(product(range(FILLERS), repeat=PLACES))
    texts = [[text for text in every if _on_side((item, *text), side)] for item in range(items)]
    if count > (most := len(places) * min(map(len, texts))):
        raise ConfigError(f"{count} documents of one source and side: there are {most} different ones; ask for fewer")
    unused = [iter(rng.permutation(len(texts[item])).tolist()) for *_, item in places]
    rounds = [rng.permutation(len(places)) for _ in range(-(-count // len(places)))]
    for number in np.concatenate(rounds)[:count].tolist():
        asked, answered, item = places[number]
        yield Asked(item, texts[item][next(unused[number])], asked, answered)


def _may_ask(asked: int, answered: int, item: int, side: str) -> bool:
    """Returns whether a side (training or held-out) may ask for an item of one domain in the alphabet of another domain.
    Questions within one domain are on both sides of the domains' sources, and on the training side of `parallel`."""
    return asked == answered or _on_side((asked, answered, item), side)


def _on_side(numbers: Sequence[int], side: str) -> bool:
    return (sum(numbers) % HELD_OUT == 0) == (side == "valid")


def _written(out: Path, documents: Mapping[str, Mapping[str, Sequence[Document]]], every: Sequence[Alphabet]) -> Manifest:
    """Writes the documents of each source and side, and the manifest. Each alphabet is a modality, so that a configuration
    can assign an expert to the tokens of a domain."""
    starts = [0, *(each.ask for each in every[1:])]  # padding and the end-of-document token count as the first domain's
    modalities = {name: ((start, each.end),) for name, start, each in zip(DOMAINS, starts, every, strict=True)}
    layout = Manifest.model_construct(vocab_size=every[-1].end, modalities=modalities)
    out.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_complete(out) as folder:
        sources = {}
        for name, sides in documents.items():
            splits = {side: write_split(folder, f"{name}_{side}", each, layout) for side, each in sides.items()}
            sources[name] = SourceSection(train=splits["train"], valid=splits["valid"], licence=LICENCE)
        manifest = Manifest(
            name="domains",
            vocab_size=layout.vocab_size,
            modalities=modalities,
            pad_id=0,
            eos_id=1,
            sources=sources,
        )
        manifest = manifest.model_copy(update={"baselines": count_baselines(folder, manifest)})
        write_manifest(manifest, folder)
    return manifest


if __name__ == "__main__":
    run_command(main)
