"""Count models against a loop over labels."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from moe_dist.data.baselines import BIGRAM_PRIOR, count_baselines

TRAIN = {"a": [[300, 100, 101, 100, 1], [301, 101, 101, 300]], "b": [[300, 301, 300, 302, 1]]}
VALID = {"a": [[300, 101, 100, 100, 1, 302]], "b": [[301, 300, 400], [5]]}
FILLER = {"a_valid": [0, 1, 0, 1, 0, 0]}


def is_image(token: int) -> bool:
    return 100 <= token < 200


def by_loop(kind: str, image: bool, sources: str, skip_filler: bool) -> float:
    size = 100 if image else 9_900
    documents = [document for of_source in TRAIN.values() for document in of_source]
    pairs = [pair for document in documents for pair in pairwise(document) if is_image(pair[1]) == image]
    counts, pair_counts, lefts = Counter(x for _, x in pairs), Counter(pairs), Counter(a for a, _ in pairs)
    nats = []
    for source in sources:
        bits = iter(FILLER.get(f"{source}_valid", [0] * 100))
        for tokens in VALID[source]:
            marks = [next(bits) for _ in tokens]
            for at in range(1, len(tokens)):
                left, label = tokens[at - 1], tokens[at]
                if is_image(label) != image or (skip_filler and marks[at]):
                    continue
                p = (counts[label] + 1) / (len(pairs) + size)
                if kind == "left_bigram":
                    p = (pair_counts[left, label] + BIGRAM_PRIOR * p) / (lefts[left] + BIGRAM_PRIOR)
                nats.append(-math.log(p))
    return sum(nats) / len(nats)


def test_against_a_loop(tmp_path: Path, make_set) -> None:
    manifest = make_set(tmp_path, {name: (TRAIN[name], VALID[name]) for name in "ab"}, FILLER)
    expected = {}
    for kind in ("unigram", "left_bigram"):
        for prefix, sources in (("", "ab"), ("a/", "a"), ("b/", "b")):
            expected[f"{prefix}text/{kind}"] = by_loop(kind, False, sources, False)
            if sources != "b":  # it has no image label
                expected[f"{prefix}image/{kind}"] = by_loop(kind, True, sources, False)
                expected[f"{prefix}image_no_filler/{kind}"] = by_loop(kind, True, sources, True)
    assert count_baselines(tmp_path, manifest) == pytest.approx(expected, rel=1e-12)


def test_without_a_held_out_side_there_are_none(tmp_path: Path, make_set) -> None:
    assert count_baselines(tmp_path, make_set(tmp_path, {"a": (TRAIN["a"], None)})) == {}
