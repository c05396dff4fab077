"""The cross entropies of N-gram models equal the results of a loop over the labels."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from moe_dist.data import baselines
from moe_dist.data.baselines import BIGRAM_PRIOR, count_baselines

TRAIN = {"a": [[300, 100, 101, 100, 1], [301, 101, 101, 300]], "b": [[300, 301, 300, 302, 1]]}
VALID = {"a": [[300, 101, 100, 100, 1, 302]], "b": [[301, 300, 400], [5]]}
FILLER = {"a_valid": [0, 1, 0, 1, 0, 0]}
PROMPT = {"a_train": [1, 1, 0, 0, 0, 1, 1, 1, 0], "b_valid": [1, 1, 0, 0]}


def is_image(token: int) -> bool:
    return 100 <= token < 200


def labels(side: str, sources: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    """Yields for each scored label the token before the label, the label, and the label's place in the source's file."""
    for source in sources:
        place = 0
        for tokens in (TRAIN if side == "train" else VALID)[source]:
            for at in range(1, len(tokens)):
                if not PROMPT.get(f"{source}_{side}", [0] * 100)[place + at]:
                    yield tokens[at - 1], tokens[at], place + at
            place += len(tokens)


def by_loop(kind: str, image: bool, sources: str, skip_filler: bool) -> float:
    size = 100 if image else 9_900
    pairs = [(left, label) for left, label, _ in labels("train", TRAIN) if is_image(label) == image]
    counts, pair_counts, lefts = Counter(x for _, x in pairs), Counter(pairs), Counter(a for a, _ in pairs)
    nats = []
    for source in sources:
        marks = FILLER.get(f"{source}_valid", [0] * 100)
        for left, label, place in labels("valid", [source]):
            if is_image(label) != image or (skip_filler and marks[place]):
                continue
            p = (counts[label] + 1) / (len(pairs) + size)
            if kind == "left_bigram":
                p = (pair_counts[left, label] + BIGRAM_PRIOR * p) / (lefts[left] + BIGRAM_PRIOR)
            nats.append(-math.log(p))
    return sum(nats) / len(nats)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
def test_against_a_loop(tmp_path: Path, make_set, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", chunk)
    manifest = make_set(tmp_path, {name: (TRAIN[name], VALID[name]) for name in "ab"}, FILLER, PROMPT)
    expected = {}
    for kind in ("unigram", "left_bigram"):
        for prefix, sources in (("", "ab"), ("a/", "a"), ("b/", "b")):
            expected[f"{prefix}text/{kind}"] = by_loop(kind, False, sources, False)
            if sources != "b":  # source b has no image labels
                expected[f"{prefix}image/{kind}"] = by_loop(kind, True, sources, False)
                expected[f"{prefix}image_no_filler/{kind}"] = by_loop(kind, True, sources, True)
    assert count_baselines(tmp_path, manifest) == pytest.approx(expected, rel=1e-12)
