"""Turns facts into questions: selects facts, draws wrong choices, and places the right choice."""

from collections.abc import Sequence

import numpy as np

from moe_dist.errors import DataError
from moe_dist.inference.questions.fact import NUM_CHOICES, Fact, Part, Question
from moe_dist.inference.questions.split import Side, on_side, uniform

_DRAWS = 64  # random draws of wrong answers before all of them are searched


def make_questions(task: str, facts: Sequence[Fact], side: Side, *, seed: int, limit: int | None = None) -> list[Question]:
    """The questions of one side of a task, at most `limit`; a smaller limit gives the first questions of a larger one.

    Wrong choices are right answers of other facts of the same side and pool, so that they are words of similar frequency
    and occur on no other side. The right choice stands at each index equally often, up to one.

    Raises:
        DataError: the side has no fact with three wrong answers.
    """
    chosen = sorted(on_side(facts, side, seed), key=lambda fact: uniform("order", seed, task, fact.id))
    pools: dict[str, list[Part]] = {}
    for fact in chosen:
        pools.setdefault(fact.pool, []).append(fact.answer)
    answers = {pool: list(dict.fromkeys(each)) for pool, each in pools.items()}
    questions: list[Question] = []
    for fact in chosen:
        if limit is not None and len(questions) == limit:
            break
        wrong = _wrong(task, fact, list(fact.closed) or answers[fact.pool], seed)
        if wrong is not None:
            answer = len(questions) % NUM_CHOICES
            choices = (*wrong[:answer], fact.answer, *wrong[answer:])
            questions.append(Question(task, fact.id, fact.asked, choices, answer))
    if not questions:
        raise DataError(
            f"--tasks {task}: none of its {len(facts)} facts is of the {side} side (--split) with {NUM_CHOICES - 1} wrong "
            "answers of the same side; take another --split, --seed or task"
        )
    return questions


def _wrong(task: str, fact: Fact, answers: Sequence[Part], seed: int) -> list[Part] | None:
    """Three distinct wrong answers at random; None if there are fewer."""
    rng = np.random.default_rng(int(uniform("wrong", seed, task, fact.id) * 2**53))
    never = {fact.answer, *fact.wrong}
    wrong: list[Part] = []
    order = [*rng.integers(len(answers), size=_DRAWS).tolist(), *range(len(answers))]
    for number in order:
        if answers[number] not in never:
            wrong.append(answers[number])
            never.add(answers[number])
        if len(wrong) == NUM_CHOICES - 1:
            return wrong
    return None
