"""Computes baselines for the held-out loss: the losses of unigram and bigram models that count the training tokens.

As in the loader, every token is a label except the first token of a document and the tokens of a prompt. The id of a label
determines its modality. The unigram and bigram models know the label's modality, but a language model must predict it. This
lowers the baselines slightly, so a language model with a loss below a baseline is certainly better.

    unigram      p(x)     = (c(x) + 1) / (sum_x' c(x') + ids of the modality)
    left_bigram  p(x | a) = (c(a, x) + k p(x)) / (c(a) + k),  a the token before x, p(x) the unigram, k = BIGRAM_PRIOR

The counts are over the modality's training labels. c(x) is the number of labels x, c(a, x) the number of labels x after the
token a, and c(a) the number of all labels after a.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_dist.data.indexed import IndexedSplit
from moe_dist.formats.manifest import Manifest, SplitSection

_CHUNK = 1 << 18  # number of tokens that are read at once
BIGRAM_PRIOR = 200.0  # gives nearly the lowest held-out loss for text and image codes of the default corpus


class _Labels:
    """Some labels, and for each label the token before it, and whether it is filler (the code of a background cell)."""

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
    """Returns the mean held-out loss in nats per label of the unigram and bigram models of all sources' training tokens.

    The keys '<modality>/unigram' and '<modality>/left_bigram' are for the held-out labels of all sources. The keys
    '<modality>_no_filler/...', if there is filler, omit picture cells that show only background. The keys
    '<source>/<modality>/...', if there are several sources, are for the labels of one source. Reads tokens in chunks, but
    keeps all distinct pairs of held-out tokens in memory.

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
    """Sums the nats of the held-out labels of one source and one modality."""

    def __init__(self, model: "_Ngrams", chunks: Iterator[_Labels]) -> None:
        self._sums: defaultdict[tuple[str, bool], float] = defaultdict(float)  # keyed by (kind, filler)
        self._counts: Counter[bool] = Counter()  # keyed by filler
        for labels in map(model.inside, chunks):
            for filler in (False, True):
                part = labels.where(labels.filler == filler)
                self._counts[filler] += len(part.label)
                for kind, nats in model.nats(part).items():
                    self._sums[kind, filler] += float(nats.sum())
        self.filler = self._counts[True]  # number of labels that are filler

    def sum(self, kind: str, no_filler: bool) -> tuple[float, int]:
        """Returns the sum of nats and the number of labels."""
        sides = (False,) if no_filler else (False, True)
        return sum(self._sums[kind, side] for side in sides), sum(self._counts[side] for side in sides)


class _Ngrams:
    """Counts one modality's training labels. Counts only pairs of tokens that occur in held-out data, because an array of
    all pairs would have vocab_size^2 elements."""

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
        """Adds the pairs of these held-out labels to the pairs that `count` counts. Must not be called after `count`."""
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
        """Maps each kind of model (unigram, bigram) to the nats of each held-out label."""
        size = sum(end - first for first, end in self._ranges)
        p = (self._counts[labels.label] + 1) / (self._counts.sum() + size)
        counts = self._pair_counts[np.searchsorted(self._pairs, self._pair(labels))]
        bigram = (counts + BIGRAM_PRIOR * p) / (self._left_counts[labels.left] + BIGRAM_PRIOR)
        return {"unigram": -np.log(p), "left_bigram": -np.log(bigram)}

    def _pair(self, labels: _Labels) -> np.ndarray:
        return labels.left * self._vocab_size + labels.label
