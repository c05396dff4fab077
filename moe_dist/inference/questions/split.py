"""Which side a fact stands on: one function of a seed and the fact's keys, for all tasks at once.

Each key (a lemma, a picture family) has a side of its own, by hash. A fact belongs to a side only if all its keys do, and
to none otherwise: so whatever shares a synset, lemma or picture family with a training item is never in a test, in
whichever task. The price is the facts between the sides. Components of facts that share keys would cost none, but nearly
all of WordNet is one component. The sides depend on no file: a question set that is left out changes nothing in the others.
"""

import hashlib
from collections.abc import Iterable
from enum import StrEnum

from moe_dist.inference.questions.fact import Fact

# Shares of the keys. A fact with two keys is held out for testing with the square of the last share.
TRAIN_SHARE, VALID_SHARE, TEST_SHARE = 0.5, 0.2, 0.3


class Side(StrEnum):
    """What the questions of a fact may be used for."""

    TRAIN = "train"
    VALID = "valid"
    TEST = "test"


def uniform(*parts: object) -> float:
    """A number in [0, 1) that is a function of its arguments alone, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def side_of_key(key: str, seed: int) -> Side:
    """The side of everything that has this key."""
    number = uniform("side", seed, key)
    if number < TRAIN_SHARE:
        return Side.TRAIN
    return Side.VALID if number < TRAIN_SHARE + VALID_SHARE else Side.TEST


def side_of(fact: Fact, seed: int) -> Side | None:
    """The side on which all keys of a fact stand; None where they stand on several, and the fact is left out.

    A picture family stands where the run's own data put it: what the run was trained on is training, and held-out families
    are divided between the two other sides.
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
