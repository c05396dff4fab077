"""Makes the data of the experiment mole: questions about pictures and captions, with answers under conflicting naming
conventions.

    python -m research.experiments.convention_data --base .cache/data/reproduce --out .cache/data/conventions

The question about a picture asks for the colour of its background. The question about a caption asks for its language. A
convention shifts the names of answers: the k-th of n answers is called by the (k + step)-th name, counted modulo n. Only
the instruction says which convention to use. An instruction is one of many paraphrases, some of which are held out.
Pictures and captions that are held out in the base data are also held out here, because the base data trained the model
that is adapted. All conventions ask about the same pictures and captions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from moe_dist.data.codebook import load_codebook
from moe_dist.data.corpus_packages import LANGUAGES
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.pictures import BACKGROUNDS
from moe_dist.data.tokenizer import BOS, EOS, encode_texts, load_tokenizer, special_ids
from moe_dist.errors import ConfigError, DataError
from moe_dist.formats.manifest import Manifest, SourceSection, SplitSection, load_manifest
from moe_dist.inference.questions.catalogue import OPENMOJI
from moe_dist.runtime.command_line import reports_errors, run_command
from research.experiments.instructed import (
    Document,
    check_new,
    data_folder,
    instructed_document,
    write_sources,
    write_split,
)

COLOURS = ("white", "grey", "yellow", "red", "pink", "blue", "cyan", "green")  # names of the colours in BACKGROUNDS
TONGUES = ("English", "German", "French", "Japanese", "Spanish")  # names of the languages in LANGUAGES
# Maps a convention to (shift of the names, words that name the convention in instructions).
CONVENTIONS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "plain": (0, ("plain", "usual", "common", "ordinary")),
    "shifted": (2, ("shifted", "moved", "turned", "displaced")),
    "far": (4, ("far", "distant", "remote", "outer")),
}
TEMPLATES = (
    "Give the {} name.",
    "What is its {} name?",
    "Answer in the {} way.",
    "Use the {} words.",
    "Tell the {} word for it.",
    "By the {} rule, what is it?",
    "The {} answer, please.",
    "Name it as {} people do.",
)


@dataclass(frozen=True)
class Asked:
    """A picture or caption to ask about: its tokens, the index of the right answer, and the names of all answers."""

    tokens: np.ndarray
    right: int
    names: Sequence[str]


def paraphrases(convention: str, side: str) -> list[str]:
    """Returns the instructions for a convention on the training side or the held-out side. Both sides use every word and
    every template, but no pair of a word and a template is on both sides."""
    _, words = CONVENTIONS[convention]
    pairs = product(enumerate(words), enumerate(TEMPLATES))
    return [template.format(word) for (i, word), (j, template) in pairs if ((i + j) % len(words) == 0) == (side == "valid")]


def answer(convention: str, asked: Asked) -> str:
    """Returns the answer that is right under a convention."""
    step, _ = CONVENTIONS[convention]
    return asked.names[(asked.right + step) % len(asked.names)]


@reports_errors()
def main(
    base: Annotated[Path, typer.Option(help="Data set with the pictures and captions.")] = Path(".cache/data/reproduce"),
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path(".cache/data/conventions"),
    questions: Annotated[int, typer.Option(min=2, help="Training questions of each convention.")] = 6000,
    heldout: Annotated[int, typer.Option(min=2, help="Held-out questions of each convention.")] = 1200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions and of their instructions.")] = 0,
) -> None:
    """Make the data: for each convention (plain, shifted, far) a source NAME, and a larger source NAME-twice."""
    made = make(base, out, questions=questions, heldout=heldout, seed=seed)
    print(", ".join(f"{name} {source.train.documents}" for name, source in made.sources.items()))


def make(base: Path, out: Path, *, questions: int, heldout: int, seed: int) -> Manifest:
    """Makes the folder.

    Raises:
        ConfigError: `out` exists, or the base has too few OpenMoji pictures.
        DataError: the base is damaged.
    """
    check_new(out)
    manifest = load_manifest(base)
    source = manifest.sources.get(OPENMOJI)
    if source is None or source.valid is None or manifest.image is None:
        raise ConfigError(
            f"--base {base}: has no pictures of {OPENMOJI} with a held-out side; make it with tools.prepare_data"
        )
    tokenizer = load_tokenizer(base / str(manifest.tokenizer))
    sides = {
        "train": _asked(base, manifest, source.train, tokenizer, count=2 * questions, seed=seed),
        "valid": _asked(base, manifest, source.valid, tokenizer, count=heldout, seed=seed),
    }
    with data_folder(out, base, manifest) as folder:
        sections = {}
        for convention in CONVENTIONS:
            documents = _documents(convention, "valid", sides["valid"], tokenizer, seed)
            valid = write_split(folder, f"{convention}_valid", documents, manifest)
            for name, count in ((convention, questions), (f"{convention}-twice", 2 * questions)):
                documents = _documents(convention, "train", sides["train"][:count], tokenizer, seed)
                train = write_split(folder, f"{name}_train", documents, manifest)
                sections[name] = SourceSection(
                    train=train, valid=valid, licence=source.licence, attribution=source.attribution
                )
        return write_sources(folder, manifest, "conventions", sections)


def _asked(
    base: Path, manifest: Manifest, split: SplitSection, tokenizer: Tokenizer, *, count: int, seed: int
) -> list[Asked]:
    """Takes captions and pictures in turn from the documents of a split. Each document gives one caption or one picture."""
    data = IndexedSplit(base, split)
    colour_of_code = _colours(base, manifest)
    order = np.random.default_rng(seed).permutation(len(data.starts_D)).tolist()
    found: list[Asked] = []
    for place in order:
        start, length = int(data.starts_D[place]), int(data.lengths_D[place])
        tokens, filler = data.tokens(start, length), data.filler(start, length)
        asked = (
            _picture(manifest, tokens, filler, colour_of_code) if len(found) % 2 else _caption(manifest, tokens, tokenizer)
        )
        if asked is not None:
            found.append(asked)
        if len(found) == count:
            return found
    raise ConfigError(f"{split.path} of {base} has pictures for {len(found)} questions, not for {count}; ask for fewer")


def _picture(manifest: Manifest, tokens: np.ndarray, filler: np.ndarray, colour_of_code: np.ndarray) -> Asked | None:
    """Returns a document's picture, and the index of its background colour. Returns None if no cell of the picture shows
    only background."""
    begin, end = _image(manifest, tokens)
    first_code = manifest.vocab_size - len(colour_of_code)
    colours = colour_of_code[tokens[filler] - first_code]
    return Asked(tokens[begin:end], int(np.bincount(colours).argmax()), COLOURS) if len(colours) else None


def _caption(manifest: Manifest, tokens: np.ndarray, tokenizer: Tokenizer) -> Asked:
    begin, end = _image(manifest, tokens)
    caption = np.concatenate([tokens[1:begin], tokens[end:-1]])
    language = tokenizer.decode(caption.tolist()).partition(":")[0]
    if language not in LANGUAGES:
        raise DataError(f"a caption begins with {language!r}, not with one of {', '.join(LANGUAGES)}: other data")
    return Asked(caption, LANGUAGES.index(language), TONGUES)


def _image(manifest: Manifest, tokens: np.ndarray) -> tuple[int, int]:
    """Returns the index of the first token of a document's picture, and the index of the token after the picture."""
    assert manifest.image is not None
    (begin,) = np.flatnonzero(tokens == manifest.image.begin_id)
    (end,) = np.flatnonzero(tokens == manifest.image.end_id)
    return int(begin), int(end) + 1


def _colours(base: Path, manifest: Manifest) -> np.ndarray:
    """Returns for each code the index in BACKGROUNDS of the colour nearest to the code's mean colour, int [codes]."""
    assert manifest.image is not None
    means = load_codebook(base / str(manifest.image.codebook)).astype(np.float64).mean((1, 2))
    return ((means[:, None] - np.array(BACKGROUNDS, np.float64)) ** 2).sum(-1).argmin(1)


def _documents(convention: str, side: str, every: Sequence[Asked], tokenizer: Tokenizer, seed: int) -> Iterator[Document]:
    """Yields the documents of a convention. A document is a picture or caption, the instruction, a space and the answer."""
    special, instructions = special_ids(tokenizer), paraphrases(convention, side)
    # The seed depends on the convention, so that a picture gets different paraphrases in each convention.
    rng = np.random.default_rng((seed, list(CONVENTIONS).index(convention)))
    drawn = rng.integers(len(instructions), size=len(every)).tolist()
    asked = encode_texts(tokenizer, [f"\n{instructions[number]}\nAnswer:" for number in drawn])
    answers = encode_texts(tokenizer, [f" {answer(convention, each)}" for each in every])
    for each, question, reply in zip(every, asked, answers, strict=True):
        read = np.concatenate([[special[BOS]], each.tokens, question])
        yield instructed_document(read, reply, eos_id=special[EOS])


if __name__ == "__main__":
    run_command(main)
