"""The data of the experiment mole: one question about each picture and caption, answered by contradicting conventions.

    python -m tools.experiments.convention_data --base .cache/data/reproduce --out .cache/data/conventions

The question about a picture is the colour of its background, about a caption its language. A convention answers with a
shifted name: the k-th of n answers is called by the (k + step)-th name. Only the instruction tells which convention to use.
It is one of many paraphrases, some of which are held out. Pictures, captions and their sides come from the base data, so
that a model trained on these can be adapted; all conventions ask about the same ones.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from tokenizers import Tokenizer

from moe_dist.config.manifest import Manifest, SourceSection, SplitSection, load_manifest
from moe_dist.data.codebook import load_codebook
from moe_dist.data.corpus_openmoji import LANGUAGES
from moe_dist.data.indexed import IndexedSplit
from moe_dist.data.pictures import BACKGROUNDS
from moe_dist.data.prepare import renamed_when_complete
from moe_dist.data.tokenizer import BOS, EOS, encode_texts, load_tokenizer, special_ids
from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.questions.pictures import OPENMOJI
from moe_dist.runtime.command_line import reports_errors, run_command
from tools.experiments.instructed import Document, instructed_document, write_sources, write_split

COLOURS = ("white", "grey", "yellow", "red", "pink", "blue", "cyan", "green")  # of BACKGROUNDS
TONGUES = ("English", "German", "French", "Japanese", "Spanish")  # of LANGUAGES
# For each convention: the shift of its names, and words that stand for it in instructions.
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
    """The subject of a question: its tokens, the index of the right answer, and the names of all answers."""

    tokens: np.ndarray
    right: int
    names: Sequence[str]


def paraphrases(convention: str, side: str) -> list[str]:
    """A side's instructions of a convention. Each word and each template occurs on both sides, but no pair of them does."""
    _, words = CONVENTIONS[convention]
    pairs = product(enumerate(words), enumerate(TEMPLATES))
    return [template.format(word) for (i, word), (j, template) in pairs if ((i + j) % len(words) == 0) == (side == "valid")]


def answer(convention: str, asked: Asked) -> str:
    """Name of the right answer under a convention."""
    step, _ = CONVENTIONS[convention]
    return asked.names[(asked.right + step) % len(asked.names)]


@reports_errors()
def main(
    base: Annotated[Path, typer.Option(help="The base's data.")] = Path(".cache/data/reproduce"),
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path(".cache/data/conventions"),
    questions: Annotated[int, typer.Option(min=2, help="Of each convention on the training side.")] = 6000,
    heldout: Annotated[int, typer.Option(min=2, help="Of each convention on the held-out side.")] = 1200,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions and their instructions.")] = 0,
) -> None:
    """Make the data: sources plain, shifted and far, and NAME-twice with twice the questions of each."""
    made = make(base, out, questions=questions, heldout=heldout, seed=seed)
    print(", ".join(f"{name} {source.train.documents}" for name, source in made.sources.items()))


def make(base: Path, out: Path, *, questions: int, heldout: int, seed: int) -> Manifest:
    """Makes the folder.

    Raises:
        ConfigError: `out` exists, or the base has too few pictures or none with this form.
        DataError: the base is damaged.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; remove it, or name another")
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
    out.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_complete(out) as folder:
        for file in filter(None, (manifest.tokenizer, manifest.image.codebook)):
            shutil.copyfile(base / file, folder / file)
        writer = _Writer(folder, manifest, tokenizer, seed)
        sections = {}
        for convention in CONVENTIONS:
            valid = writer.split(convention, "valid", sides["valid"])
            for name, count in ((convention, questions), (f"{convention}-twice", 2 * questions)):
                train = writer.split(convention, "train", sides["train"][:count], name=name)
                sections[name] = SourceSection(
                    train=train, valid=valid, licence=source.licence, attribution=source.attribution
                )
        return write_sources(folder, manifest, "conventions", sections)


def _asked(
    base: Path, manifest: Manifest, split: SplitSection, tokenizer: Tokenizer, *, count: int, seed: int
) -> list[Asked]:
    """Alternating pictures and captions from a side's documents; a picture is asked about without its caption."""
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
    """The picture of a document, if at least one of its cells shows only background."""
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
    """Index of the picture's first token, and of the token after its last one."""
    assert manifest.image is not None
    (begin,) = np.flatnonzero(tokens == manifest.image.begin_id)
    (end,) = np.flatnonzero(tokens == manifest.image.end_id)
    return int(begin), int(end) + 1


def _colours(base: Path, manifest: Manifest) -> np.ndarray:
    """For each code the background colour nearest to its mean colour [codes]."""
    assert manifest.image is not None
    means = load_codebook(base / str(manifest.image.codebook)).astype(np.float64).mean((1, 2))
    return ((means[:, None] - np.array(BACKGROUNDS, np.float64)) ** 2).sum(-1).argmin(1)


class _Writer:
    """Writes sides of conventions: the subject, the instruction, a space and the answer."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer, seed: int) -> None:
        self._folder, self._manifest, self._tokenizer, self._seed = folder, manifest, tokenizer, seed
        self._special = special_ids(tokenizer)

    def split(self, convention: str, side: str, every: Sequence[Asked], *, name: str = "") -> SplitSection:
        documents = self._documents(convention, side, every)
        return write_split(self._folder, f"{name or convention}_{side}", documents, self._manifest)

    def _documents(self, convention: str, side: str, every: Sequence[Asked]) -> Iterator[Document]:
        instructions = paraphrases(convention, side)
        # In each convention the same position has the same picture, with another instruction.
        rng = np.random.default_rng((self._seed, list(CONVENTIONS).index(convention)))
        drawn = rng.integers(len(instructions), size=len(every)).tolist()
        asked = encode_texts(self._tokenizer, [f"\n{instructions[number]}\nAnswer:" for number in drawn])
        answers = encode_texts(self._tokenizer, [f" {answer(convention, each)}" for each in every])
        for each, question, reply in zip(every, asked, answers, strict=True):
            read = np.concatenate([[self._special[BOS]], each.tokens, question])
            yield instructed_document(read, reply, eos_id=self._special[EOS])


if __name__ == "__main__":
    run_command(main)
