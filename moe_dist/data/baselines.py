"""Computes baselines for held-out loss from unigram and bigram models counted on the training tokens.

As in the loader, every token is a label except the first token of a document and the tokens of a prompt. The modality of a
label follows from its id. The unigram and bigram models know the label's modality, which a language model must predict too.
Knowing the modality lowers the loss of unigram and bigram slightly. A language model whose loss is below a unigram's or
bigram's is therefore the better model.

    unigram      p(x)     = (c(x) + 1) / (sum_x' c(x') + ids of the modality)
    left_bigram  p(x | a) = (c(a, x) + k p(x)) / (c(a) + k),  a the token before x, p(x) the unigram, k = BIGRAM_PRIOR

c(x), c(a, x) and c(a) count the modality's training labels: c(x) the labels x, c(a, x) the labels x after the token a,
c(a) all labels after a.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_dist.data.indexed import IndexedSplit
from moe_dist.formats.manifest import Manifest, SplitSection

_CHUNK = 1 << 18  # tokens read at once
BIGRAM_PRIOR = 200.0  # gives nearly the lowest held-out loss for text and image codes of the default corpus


class _Labels:
    """Some labels, the token before each label, and whether each label is filler (a background cell)."""

    def __init__(self, label: np.ndarray, left: np.ndarray, filler: np.ndarray) -> None:
        self.label, self.left, self.filler = label, left, filler

    def where(self, chosen: np.ndarray) -> "_Labels":
        return _Labels(self.label[chosen], self.left[chosen], self.filler[chosen])


def _read(folder: str | Path, split: SplitSection) -> Iterator[_Labels]:
    data = IndexedSplit(folder, split)
    firsts = data.starts_D[data.lengths_D > 0]
    for start in range(0, data.header.tokens, _CHUNK):
        count = min(_CHUNK, data.header.tokens - start)
        before = min(1, start)
        tokens = data.tokens(start - before, count + before)
        is_label = ~data.prompt(start, count)
        begin, end = np.searchsorted(firsts, (start, start + count))
        is_label[firsts[begin:end] - start] = False
        at = np.flatnonzero(is_label)
        yield _Labels(tokens[at + before], tokens[at + before - 1], data.filler(start, count)[at])


def count_baselines(folder: str | Path, manifest: Manifest) -> dict[str, float]:
    """Returns mean held-out nats per label of unigram and bigram models, counted on the training tokens of all sources.

    Keys: '<modality>/unigram' and '<modality>/left_bigram' for the held-out labels of all sources.
    '<modality>_no_filler/...' leaves out picture cells of only background, if there are any. '<source>/<modality>/...' has
    only the labels of one source, if there are several sources. Reads the tokens in chunks. Only the distinct pairs of
    held-out tokens are all in memory.

    Raises:
        DataError: files are damaged or disagree with the manifest.
    """
    heldout = {name: source.valid for name, source in manifest.sources.items() if source.valid}
    baselines: dict[str, float] = {}
    for modality, ranges in manifest.modalities.items():
        model = _Ngrams(ranges, manifest.vocab_size)
        for split in heldout.values():
            for labels in _read(folder, split):
                model.ask(labels)
        for source in manifest.sources.values() if heldout else ():
            for labels in _read(folder, source.train):
                model.count(labels)
        scores = {name: _Scores(model, _read(folder, split)) for name, split in heldout.items()}
        subsets = {modality: False}
        if any(each.filler for each in scores.values()):
            subsets[f"{modality}_no_filler"] = True
        for subset, no_filler in subsets.items():
            for kind in ("unigram", "left_bigram"):
                sums = {name: each.sum(kind, no_filler) for name, each in scores.items()}
                whole = [sum(column) for column in zip(*sums.values(), strict=True)]
                named = {"": whole, **({f"{name}/": part for name, part in sums.items()} if len(sums) > 1 else {})}
                found = {f"{name}{subset}/{kind}": part for name, part in named.items() if part and part[1]}
                baselines |= {key: nats / count for key, (nats, count) in found.items()}
    return baselines


class _Scores:
    """Sums of nats over the held-out labels of one source and one modality."""

    def __init__(self, model: "_Ngrams", chunks: Iterator[_Labels]) -> None:
        self._sums: defaultdict[tuple[str, bool], float] = defaultdict(float)  # by (kind, filler)
        self._counts: Counter[bool] = Counter()  # by filler
        for labels in map(model.inside, chunks):
            for filler in (False, True):
                part = labels.where(labels.filler == filler)
                self._counts[filler] += len(part.label)
                for kind, nats in model.nats(part).items():
                    self._sums[kind, filler] += float(nats.sum())
        self.filler = self._counts[True]  # number of labels that are filler

    def sum(self, kind: str, no_filler: bool) -> tuple[float, int]:
        """Returns the sum of nats, and the number of labels."""
        sides = (False,) if no_filler else (False, True)
        return sum(self._sums[kind, side] for side in sides), sum(self._counts[side] for side in sides)


class _Ngrams:
    """Counts of one modality's training labels. Pairs of tokens are counted only if the held-out side has them, because an
    array of all pairs would have vocab_size^2 elements."""

    def __init__(self, ranges: tuple[tuple[int, int], ...], vocab_size: int) -> None:
        self._ranges, self._vocab_size = ranges, vocab_size
        self._counts, self._left_counts = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
        self._pairs, self._pair_counts = np.empty(0, np.int64), np.empty(0, np.int64)

    def inside(self, labels: _Labels) -> _Labels:
        """Returns the labels of this modality."""
        chosen = np.zeros(len(labels.label), bool)
        for first, end in self._ranges:
            chosen |= (labels.label >= first) & (labels.label < end)
        return labels.where(chosen)

    def ask(self, labels: _Labels) -> None:
        """Adds the pairs of held-out labels to the pairs that `count` counts. All calls come before the first call of
        `count`."""
        self._pairs = np.union1d(self._pairs, self._pair(self.inside(labels)))
        self._pair_counts = np.zeros(len(self._pairs), np.int64)

    def count(self, labels: _Labels) -> None:
        labels = self.inside(labels)
        self._counts += np.bincount(labels.label, minlength=self._vocab_size)
        self._left_counts += np.bincount(labels.left, minlength=self._vocab_size)
        pair = self._pair(labels)
        at = np.searchsorted(self._pairs, pair)
        at = at[np.append(self._pairs, -1)[at] == pair]  # no pair is -1
        self._pair_counts += np.bincount(at, minlength=len(self._pairs))

    def nats(self, labels: _Labels) -> dict[str, np.ndarray]:
        """Returns the nats of each held-out label, by kind of model (unigram or bigram)."""
        size = sum(end - first for first, end in self._ranges)
        p = (self._counts[labels.label] + 1) / (self._counts.sum() + size)
        counts = self._pair_counts[np.searchsorted(self._pairs, self._pair(labels))]
        bigram = (counts + BIGRAM_PRIOR * p) / (self._left_counts[labels.left] + BIGRAM_PRIOR)
        return {"unigram": -np.log(p), "left_bigram": -np.log(bigram)}

    def _pair(self, labels: _Labels) -> np.ndarray:
        return labels.left * self._vocab_size + labels.label
