"""Makes the data of the experiment roma. A model is trained on these data before its routers are tuned.

    python -m research.experiments.question_data --base .cache/data/reproduce --out .cache/data/questions

The data are the sources of the base data, and questions of WordNet and reasoning-gym with their right answers, written as
by `tools.evaluate`. Only training questions are used (see `moe_dist.inference.questions.split`). The first questions of
each task are left out, because `tools.prepare_router_tuning --limit` makes its samples from these questions. A question is
also left out if it has the same numbers, or asks about the same pair of antonyms, as one of the first questions. A question
about the same noun as one of them is kept. More seeds of reasoning-gym give more questions. No seed adds a held-out
question to the training data, because only the numbers in a question decide on which side (training or held-out) it is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.formats.index_header import index_paths
from moe_dist.formats.manifest import Manifest, SourceSection, load_manifest
from moe_dist.formats.split_files import BITS
from moe_dist.inference.fact import Part, Question
from moe_dist.inference.multiple_choice import Prompts
from moe_dist.inference.questions.catalogue import Catalogue
from moe_dist.inference.questions.split import Side, make_questions
from moe_dist.inference.vocabulary import Vocabulary
from moe_dist.runtime.command_line import reports_errors, run_command
from research.experiments.instructed import (
    Document,
    check_new,
    data_folder,
    instructed_document,
    write_sources,
    write_split,
)
from research.experiments.study import LEFT
from research.questions.reasoning import SIZE, key_of, reasoning
from research.questions.sources import FAMILIES, WORDNET, make_facts

SLOW = ("reasoning-number_sequence",)  # makes 2,000 questions in half a minute; other tasks take at most a second
TASKS = {name: [task for task in FAMILIES[name] if task not in SLOW] for name in ("wordnet", "reasoning")}
LICENCES = {"wordnet": ("WordNet licence", "WordNet, Princeton University"), "reasoning": ("Apache-2.0", "reasoning-gym")}


@reports_errors()
def main(
    base: Annotated[Path, typer.Option(help="Data set to copy and extend.")] = Path(".cache/data/reproduce"),
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path(".cache/data/questions"),
    wordnet: Annotated[Path, typer.Option(help="Folder with WordNet's files.")] = WORDNET,
    left: Annotated[int, typer.Option(min=1, help="Questions of each task that are left to router tuning.")] = LEFT,
    seeds: Annotated[int, typer.Option(min=1, help="Further seeds of reasoning-gym, 2,000 questions a task each.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sides; take that of tools.evaluate.")] = 0,
) -> None:
    """Make the data: the base's sources, `wordnet` and `reasoning`."""
    made = make(base, out, wordnet=wordnet, left=left, seeds=seeds, seed=seed)
    print(", ".join(f"{name} {source.train.documents}" for name, source in made.sources.items()))


def make(base: Path, out: Path, *, wordnet: Path, left: int, seeds: int, seed: int) -> Manifest:
    """Makes the folder.

    Raises:
        ConfigError: `out` exists, or a package is missing.
        DataError: the base is damaged.
    """
    check_new(out)
    manifest = load_manifest(base)
    vocabulary = Vocabulary(base, manifest, vocab_size=manifest.vocab_size)
    facts = make_facts([task for tasks in TASKS.values() for task in tasks], wordnet=wordnet, seed=seed)
    catalogue = Catalogue(vocabulary, tuple(manifest.sources), facts, seed)
    prompts = Prompts(vocabulary, listed=False)
    with data_folder(out, base, manifest, _split_files(manifest)) as folder:
        sections = dict(manifest.sources)
        for name, (licence, attribution) in LICENCES.items():
            questions = {"train": list(_trained_on(name, catalogue, left=left, seeds=seeds))}
            questions["valid"] = [q for task in TASKS[name] for q in catalogue.questions(task, Side.VALID, limit=None)]
            splits = {
                side: write_split(
                    folder, f"{name}_{side}", (_document(each, prompts, manifest.eos_id) for each in of_side), manifest
                )
                for side, of_side in questions.items()
            }
            sections[name] = SourceSection(**splits, licence=licence, attribution=attribution)
        return write_sources(folder, manifest, "questions", sections)


def _trained_on(family: str, catalogue: Catalogue, *, left: int, seeds: int) -> Iterator[Question]:
    """Yields training questions of all tasks of a family. Leaves out the first `left` questions of each task, and questions
    that give away the answer to one of these first questions."""
    for task in TASKS[family]:
        of_task = catalogue.questions(task, Side.TRAIN, limit=None)
        left_out = {_matter(question) for question in of_task[:left]}
        if family == "reasoning":
            of_task = list(_made_up(task, seeds=seeds, seed=catalogue.seed))
        yield from (question for question in of_task if _matter(question) not in left_out)


def _made_up(task: str, *, seeds: int, seed: int) -> Iterator[Question]:
    """Yields the distinct training questions of a task that come from other seeds than `seed`."""
    seen: set[Part] = set()
    # Question i of a seed is made from seed + i, so two seeds with a difference below SIZE would share questions.
    for further in range(seed + SIZE, seed + (1 + seeds) * SIZE, SIZE):
        for question in make_questions(task, reasoning(task.partition("-")[2], seed=further), Side.TRAIN, seed=seed):
            if question.asked not in seen:
                seen.add(question.asked)
                yield question


def _matter(question: Question) -> object:
    """Returns a value that two questions of a task have in common if one gives away the answer to the other."""
    family, _, name = question.task.partition("-")
    if family == "reasoning":
        return key_of(name, str(question.asked))
    if name == "antonym":
        return frozenset({question.id, question.choices[question.answer]})  # the id is the word whose antonym is asked
    return question.asked


def _document(question: Question, prompts: Prompts, eos_id: int) -> Document:
    right = prompts(question)[question.answer]
    return instructed_document(right.context, right.tokens, eos_id=eos_id)


def _split_files(manifest: Manifest) -> Iterator[str | None]:
    """Yields the names of all files of a data set's splits. Yields None in place of a file that a split does not have."""
    for _, split in manifest.splits():
        yield from (path.name for path in index_paths(Path(split.path)))
        yield from (getattr(split, bits) for bits in BITS)


if __name__ == "__main__":
    run_command(main)
