"""Assigns facts to sides by one function of a seed and the fact's keys, for all tasks at once.

A hash puts each key (a lemma, a picture family) on a side. A fact belongs to a side only if all its keys do, else it is
dropped. So no test fact shares a synset, lemma or picture family with a training fact, in any task. Connected components of
shared keys would drop no fact, but nearly all of WordNet would be one component. The sides depend on no file, so leaving a
question set out changes nothing in the others.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum

from moe_dist.inference.questions.fact import Fact

# Shares of the keys. A fact with two keys is on the test side with probability TEST_SHARE squared.
TRAIN_SHARE, VALID_SHARE, TEST_SHARE = 0.5, 0.2, 0.3


class Side(StrEnum):
    """The part of the facts that a question belongs to."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


def uniform(*parts: object) -> float:
    """A number in [0, 1) that depends only on the arguments and is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def side_of_key(key: str, seed: int) -> Side:
    """The side of a key. A fact with this key is on this side or on none."""
    number = uniform("side", seed, key)
    if number < TRAIN_SHARE:
        return Side.TRAIN
    return Side.VALID if number < TRAIN_SHARE + VALID_SHARE else Side.TEST


def side_of(fact: Fact, seed: int) -> Side | None:
    """The common side of all keys of a fact; None if the keys are on several sides.

    A picture family follows the run's own data: trained pictures are on the train side, and held-out families are divided
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
