"""Assigns facts to sides by one function of a seed and the fact's keys, for all tasks at once.

A hash puts each key (a lemma, a picture family) on a side. A fact belongs to a side only if all its keys do, else to none.
So no test fact shares a synset, lemma or picture family with a training fact, in any task. The cost is the facts with keys
on several sides. Joining facts that share keys would lose none, but would make nearly all of WordNet one component. The
sides depend on no file: leaving a question set out changes nothing in the others.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum

from moe_dist.inference.questions.fact import Fact

# Shares of the keys. A fact with two keys is in test with the square of the last share.
TRAIN_SHARE, VALID_SHARE, TEST_SHARE = 0.5, 0.2, 0.3


class Side(StrEnum):
    """The permitted use of a fact's questions."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends only on the arguments, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def side_of_key(key: str, seed: int) -> Side:
    """The side of all facts with this key, as far as the key decides."""
    number = uniform("side", seed, key)
    if number < TRAIN_SHARE:
        return Side.TRAIN
    return Side.VALID if number < TRAIN_SHARE + VALID_SHARE else Side.TEST


def side_of(fact: Fact, seed: int) -> Side | None:
    """The side on which all keys of a fact are; None, and the fact is dropped, if they are on several.

    A picture family has the side of the run's own data: trained pictures are on train; held-out families are divided
    between the two other sides.
    """
    sides = {_side(key, fact.trained_on, seed) for key in fact.keys}
    return sides.pop() if len(sides) == 1 else None


def on_side(facts: Iterable[Fact], side: Side, seed: int) -> list[Fact]:
    """The facts of one side, in their order."""
    return [fact for fact in facts if side_of(fact, seed) is side]


def _side(key: str, trained_on: bool | None, seed: int) -> Side:
    if trained_on is None or not key.startswith("family:"):
        return side_of_key(key, seed)
    if trained_on:
        return Side.TRAIN
    return Side.VALID if uniform("side", seed, key) < VALID_SHARE / (VALID_SHARE + TEST_SHARE) else Side.TEST
