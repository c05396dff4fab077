"""Makes facts from the quiz files of Debian's bsdgames (format: quiz(6)). Colons separate the fields of a line. Inside a
field, `{}` marks optional parts and `|` separates alternatives."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_dist.errors import DataError
from moe_dist.inference.fact import Fact, lemma_keys

_INNERMOST = re.compile(r"\{([^{}\[\]]*)\}|\[([^{}\[\]]*)\]")


@dataclass(frozen=True)
class Quiz:
    """Some quiz files, and the question that is asked about each of their lines."""

    files: tuple[str, ...]
    question: Callable[[str], str]  # makes the question's text from the first alternative in the field `asked`
    asked: int  # index of the field that the question contains
    answer: int  # index of the field with the answer


# A task has several quizzes if a single quiz would give too few training facts or too few held-out facts.
QUIZZES = {
    "capitals": (
        Quiz(("africa", "america", "asia", "europe"), "What is the capital of {}?".format, 0, 1),
        Quiz(("state",), "What is the capital of {}?".format, 0, 1),
    ),
    "elements": (Quiz(("elements",), "Which element has the symbol {}?".format, 0, 3),),
    "words": (
        Quiz(("collectives",), "What is a group of {} called?".format, 0, 1),
        Quiz(("babies",), "Which animal has the {} as its young?".format, 0, 1),
        Quiz(("posneg",), 'What is the opposite of "{}"?'.format, 0, 1),
        Quiz(("latin",), 'What does the Latin "{}" mean?'.format, 0, 1),
    ),
}


def trivia(folder: Path, name: str) -> list[Fact]:
    """Returns the facts of one task: one fact for each line that has no typesetting marks. The choices of a question come
    from all answers of its quiz.

    Raises:
        DataError: a file is missing or has no facts.
    """
    facts = []
    for quiz in QUIZZES[name]:
        for file in quiz.files:
            found = list(_facts(folder / file, quiz))
            if not found:
                raise DataError(f"{folder / file}: has no facts; install bsdgames again")
            facts += found
    return facts


def _facts(path: Path, quiz: Quiz) -> Iterator[Fact]:
    for fields in _lines(path):
        if len(fields) <= max(quiz.asked, quiz.answer):
            continue
        asked, answers = fields[quiz.asked][0], fields[quiz.answer]
        if asked and answers[0] and "\\" not in asked + answers[0]:
            yield Fact(
                f"{path.name}:{asked}",
                quiz.question(asked),
                answers[0],
                lemma_keys([asked, answers[0]]),
                frozenset(answers),
                pool=quiz.files[0],
            )


def alternatives(field: str) -> list[str]:
    """Returns the alternatives in a field. Each optional part is replaced by its first alternative: 'forget{-| }me' gives
    'forget-me'."""
    while (replaced := _INNERMOST.sub(lambda found: (found[1] or found[2] or "").split("|")[0], field)) != field:
        field = replaced
    return [each.strip() for each in field.split("|")]


def _lines(path: Path) -> list[list[list[str]]]:
    try:
        text = path.read_text(encoding="latin-1").replace("\\\n", "")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; install bsdgames again") from error
    return [[alternatives(field) for field in line.split(":")] for line in text.splitlines() if ":" in line]
