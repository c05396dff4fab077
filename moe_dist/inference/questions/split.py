"""Assigns facts to sides (train, validation, test) by a seed and the facts' keys, and makes the questions of a side.

A hash puts each key (a lemma or a picture family) on the train, validation or test side. If all keys of a fact are on one
side, the fact is on this side; otherwise the fact is dropped. Therefore no test fact shares a synset, lemma or picture
family with a training fact, even of another task. The alternative would be to put all facts that are connected by shared
keys on one side. It would drop no fact, but it would put nearly all of WordNet on one side. A key's side does not depend on
files, so other tasks stay the same if a task is left out.
"""

import hashlib
from collections.abc import Iterable, Sequence
from enum import StrEnum

import numpy as np

from moe_dist.errors import DataError
from moe_dist.inference.fact import NUM_CHOICES, Fact, Part, Question

# Fraction of the keys on each side. A fact with two keys is on the test side with probability TEST_SHARE^2.
TRAIN_SHARE, VALID_SHARE, TEST_SHARE = 0.5, 0.2, 0.3
_DRAWS = 64  # number of random draws of wrong choices; if they yield too few choices, all answers are tried in order


class Side(StrEnum):
    """The part of the split from whose facts questions are made."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


def uniform(*parts: object) -> float:
    """Returns a pseudorandom number in [0, 1) that is a hash of the arguments and thus equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def side_of_key(key: str, seed: int) -> Side:
    """Returns the side of a key. A fact with this key is on the same side, or is dropped."""
    number = uniform("side", seed, key)
    if number < TRAIN_SHARE:
        return Side.TRAIN
    return Side.VALID if number < TRAIN_SHARE + VALID_SHARE else Side.TEST


def side_of(fact: Fact, seed: int) -> Side | None:
    """Returns the fact's `side` if it is given, else the side of all its keys; None if the keys are on several sides.

    The key of a picture family is on the train side if the run was trained on the fact's picture. Otherwise the hash puts
    this key on the validation or test side.
    """
    if fact.side is not None:
        return Side(fact.side)
    sides = {_side(key, fact.trained_on, seed) for key in fact.keys}
    return sides.pop() if len(sides) == 1 else None


def on_side(facts: Iterable[Fact], side: Side, seed: int) -> list[Fact]:
    """Returns the facts that are on the side `side`, in the given order."""
    return [fact for fact in facts if side_of(fact, seed) is side]


def _side(key: str, trained_on: bool | None, seed: int) -> Side:
    if trained_on is None or not key.startswith("family:"):
        return side_of_key(key, seed)
    if trained_on:
        return Side.TRAIN
    return Side.VALID if uniform("side", seed, key) < VALID_SHARE / (VALID_SHARE + TEST_SHARE) else Side.TEST


def make_questions(task: str, facts: Sequence[Fact], side: Side, *, seed: int, limit: int | None = None) -> list[Question]:
    """Returns the first `limit` questions of a task on one side of the split (all if `limit` is None), in an order that
    `seed` determines.

    Wrong choices are right answers of other facts of the same side and pool. They are therefore about as common as the
    right answer, and no answer from another side appears. Over all questions, each index is right equally often, +- 1.

    Raises:
        DataError: for every fact on the side there are fewer than three wrong choices.
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
    """Returns three distinct random wrong choices for `fact` from `answers`; None if there are fewer than three."""
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
