"""Makes the data of the experiment moma-2: a closed set of facts, which training repeats for many epochs.

    python -m research.experiments.fact_data --out .cache/data/facts

The source `facts` has definitions of WordNet, one per document ("guitar: a stringed instrument ..."). The source `openmoji`
has one picture of each OpenMoji family with its English name, always rendered in the same way. The held-out split of a
source is its training split, so a model's held-out score shows how many facts the model has stored. The held-out split
packs the documents into other sequences than the training split.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from moe_dist.data.baselines import count_baselines
from moe_dist.data.corpus import Corpus, Picture, Recipe, Source, Text, content_family
from moe_dist.data.corpus_build import build
from moe_dist.data.corpus_packages import openmoji
from moe_dist.data.prepare import renamed_when_complete
from moe_dist.errors import ConfigError
from moe_dist.formats.manifest import Manifest, write_manifest
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.progress import Report, shown_progress
from research.experiments.instructed import check_new
from research.questions.wordnet import WordNet

ASKED = ("Which word means: ", "?")  # the text around the definition in WordNet's questions


@reports_errors()
def main(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path(".cache/data/facts"),
    wordnet: Annotated[Path, typer.Option(help="Folder with WordNet's files.")] = Path(".cache/package/dict"),
    definitions: Annotated[int, typer.Option(min=1, help="Number of definitions.")] = 1000,
    pictures: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 300,
    vocab_size: Annotated[int, typer.Option(min=1, help="Number of tokens of the BPE tokenizer.")] = 1024,
    codes: Annotated[int, typer.Option(min=1, help="Number of codes of the image codebook.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of facts and of the codebook.")] = 0,
) -> None:
    """Make the data: the sources `facts` and `openmoji`, whose held-out split is their training split."""
    recipe = Recipe(seed=seed, renders=1, val_fraction=0.0, vocab_size=vocab_size, codes=codes, vary=())
    texts, shown = defined_words(wordnet), one_of_each_family(openmoji(("en",)))
    with shown_progress() as report:
        made = make(out, drawn(texts, definitions, seed), drawn(shown, pictures, seed), recipe, report)
    for name, source in made.sources.items():
        print(f"{name}: {source.train.documents:,} documents, {source.train.tokens:,} tokens")


def defined_words(wordnet: Path) -> Source[Text]:
    """Returns a text for each common noun of WordNet. The text has the noun and its definition."""
    before, after = ASKED
    facts = WordNet(wordnet).definitions()
    contents = [f"{fact.answer}: {str(fact.asked).removeprefix(before).removesuffix(after)}" for fact in facts]
    texts = tuple(Text(content, content_family(content.encode()), content) for content in contents)
    return Source("facts", texts, "WordNet licence", "WordNet, Princeton University")


def one_of_each_family(source: Source[Picture]) -> Source[Picture]:
    """Returns the first picture of each family. The other pictures are nearly copies: variants of skin tone and gender."""
    firsts: dict[str, Picture] = {}
    for picture in source.items:
        firsts.setdefault(picture.family, picture)
    return replace(source, items=tuple(firsts.values()))


def drawn(source: Source, count: int, seed: int) -> Source:
    """Draws `count` items of a source at random, and returns them in the order of the source.

    Raises:
        ConfigError: the source has fewer items.
    """
    if count > len(source.items):
        raise ConfigError(f"{source.name}: {count:,} are asked for, and there are {len(source.items):,}; ask for fewer")
    chosen: Sequence[int] = sorted(np.random.default_rng(seed).permutation(len(source.items))[:count].tolist())
    return replace(source, items=tuple(source.items[number] for number in chosen))


def make(out: Path, texts: Source[Text], pictures: Source[Picture], recipe: Recipe, report: Report) -> Manifest:
    """Makes the folder.

    Raises:
        ConfigError: `out` exists.
    """
    check_new(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with renamed_when_complete(out) as folder:
        manifest, _ = build(folder, "facts", Corpus(pictures, (texts,)), recipe, report)
        sources = {name: each.model_copy(update={"valid": each.train}) for name, each in manifest.sources.items()}
        manifest = manifest.model_copy(update={"sources": sources})
        manifest = manifest.model_copy(update={"baselines": count_baselines(folder, manifest)})
        write_manifest(manifest, folder)
    return manifest


if __name__ == "__main__":
    run_command(main)
