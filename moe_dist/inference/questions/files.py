"""Reads and writes files of facts in JSON Lines, with one fact per line. docs/evaluation.md describes the fields."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from moe_dist.config.regular_file import read_regular
from moe_dist.errors import ConfigError, DataError
from moe_dist.inference.fact import Fact
from moe_dist.inference.questions.split import Side

MOST_BYTES = 1 << 28  # largest size of a file of facts
_Texts = Annotated[tuple[str, ...], FailFast()]  # pydantic would otherwise collect the faults of millions of texts


class FactLine(BaseModel):
    """The fields of one line of a file. No text is changed when it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    asked: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    task: str = Field(default="", pattern=r"^[\w.-]*$")
    id: str = ""
    keys: _Texts = ()
    wrong: _Texts = ()
    pool: str = ""
    closed: _Texts = ()
    side: Side | None = None


def read_facts(paths: Iterable[Path]) -> dict[str, list[Fact]]:
    """Returns the facts of each task, in the order of the files.

    Raises:
        ConfigError: a file cannot be read.
        DataError: a line is not a fact, or two facts of a task have the same id.
    """
    tasks: dict[str, dict[str, Fact]] = {}
    for path in paths:
        try:
            lines = read_regular(path, most_bytes=MOST_BYTES).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--questions {path}: cannot be read: {error}", see="docs/evaluation.md") from error
        for number, text in enumerate(lines, 1):
            line = _line(text, f"{path}, line {number}")
            fact = Fact(
                line.id or f"{path.stem}:{number}",
                line.asked,
                line.answer,
                frozenset(line.keys) or frozenset({f"asked:{line.asked}"}),
                frozenset(line.wrong),
                line.pool,
                line.closed,
                side=line.side,
            )
            facts = tasks.setdefault(line.task or path.stem, {})
            if facts.setdefault(fact.id, fact) is not fact:
                raise DataError(f"{path}, line {number}: id={fact.id!r}: the task has this id already; ids must differ")
    return {task: list(facts.values()) for task, facts in tasks.items()}


def _line(text: str, place: str) -> FactLine:
    try:
        return FactLine.model_validate_json(text)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc'])) or 'the line'}: {each['msg']}" for each in error.errors()]
        fields = ", ".join(FactLine.model_fields)
        raise DataError(
            [f"{place}: {fault}" for fault in faults] + [f'write {{"asked": "...", "answer": "..."}}; fields: {fields}'],
            see="docs/evaluation.md",
        ) from error


def fact_lines(tasks: Mapping[str, Sequence[Fact]]) -> str:
    """Returns the text of a file that `read_facts` reads back as equal facts. Facts with pictures cannot be written."""
    lines = []
    for task, facts in tasks.items():
        for fact in facts:
            fields = {name: value for name, value in asdict(fact).items() if value and name != "trained_on"}
            sets = {name: sorted(fields[name]) for name in ("keys", "wrong") if name in fields}
            lines.append(json.dumps({"task": task, **fields, **sets}, ensure_ascii=False) + "\n")
    return "".join(lines)
