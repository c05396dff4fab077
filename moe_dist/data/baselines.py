"""Computes baselines for held-out loss from unigram and bigram models counted on the training tokens.

As in the loader, every token is a label except the first token of a document and the tokens of a prompt. The modality of a
label follows from its id. The unigram and bigram models know the label's modality, which a language model must predict too.
Knowing the modality lowers the loss of unigram and bigram slightly. A language model whose loss is below a unigram's or
bigram's is therefore the better model.

    unigram      p(x)     = (c(x) + 1) / (sum_x' c(x') + ids of the modality)
    left_bigram  p(x | a) = (c(a, x) + k p(x)) / (c(a) + k),  a the token before x, p(x) the unigram, k = BIGRAM_PRIOR

c(x), c(a, x) and c(a) count the modality's training labels: labels x, labels x after the token a, all labels after a.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_dist.data.indexed import IndexedSplit
from moe_dist.formats.manifest import Manifest, SplitSection

BIGRAM_PRIOR = 200.0  # gives nearly the lowest held-out loss for text and image codes of the default corpus


class _Labels:
    """All labels of several splits, the token before each label, and whether each label is filler (a background cell)."""

    def __init__(self, folder: str | Path, splits: list[SplitSection]) -> None:
        parts = [self._read(IndexedSplit(folder, split)) for split in splits]
        self.label, self.left, self.filler = (np.concatenate(column) for column in zip(*parts, strict=True))

    @staticmethod
    def _read(data: IndexedSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens, filler = data.tokens(0, data.header.tokens), data.filler(0, data.header.tokens)
        is_label = np.ones(len(tokens), bool)
        is_label[data.starts_D[data.lengths_D > 0]] = False
        is_label &= ~data.prompt(0, data.header.tokens)
        at = np.flatnonzero(is_label)
        return tokens[at], tokens[at - 1], filler[at]


def count_baselines(folder: str | Path, manifest: Manifest) -> dict[str, float]:
    """Returns mean held-out nats per label of unigram and bigram models, counted on the training tokens of all sources.

    Keys: '<modality>/unigram' and '<modality>/left_bigram' for the held-out labels of all sources.
    '<modality>_no_filler/...' leaves out picture cells of only background, if there are any. '<source>/<modality>/...' has
    only the labels of one source, if there are several sources. Reads all tokens into memory, about 60 bytes per token.

    Raises:
        DataError: files are damaged or disagree with the manifest.
    """
    train = _Labels(folder, [source.train for source in manifest.sources.values()])
    heldout = {name: _Labels(folder, [source.valid]) for name, source in manifest.sources.items() if source.valid}
    baselines: dict[str, float] = {}
    for modality, ranges in manifest.modalities.items():
        inside = {name: _within(labels.label, ranges) for name, labels in heldout.items()}
        subsets = {modality: inside}
        if any((inside[name] & labels.filler).any() for name, labels in heldout.items()):
            subsets[f"{modality}_no_filler"] = {name: inside[name] & ~labels.filler for name, labels in heldout.items()}
        models = {"unigram": _Unigram(train, ranges), "left_bigram": _LeftBigram(train, ranges, manifest.vocab_size)}
        for subset, masks in subsets.items():
            for kind, model in models.items():
                baselines |= _score(model, heldout, masks, f"{subset}/{kind}")
    return baselines


def _score(
    model: "_Unigram | _LeftBigram", heldout: Mapping[str, _Labels], masks: Mapping[str, np.ndarray], key: str
) -> dict[str, float]:
    """Returns mean nats of the labels in `masks`: over all sources together, and in each source if there are several
    sources."""
    nats = {name: model.nats(labels.label[masks[name]], labels.left[masks[name]]) for name, labels in heldout.items()}
    parts = {f"{name}/{key}": part for name, part in nats.items()} if len(nats) > 1 else {}
    whole = {key: np.concatenate(list(nats.values()))} if nats else {}
    return {name: float(part.mean()) for name, part in {**whole, **parts}.items() if len(part)}


class _Unigram:
    def __init__(self, train: _Labels, ranges: tuple[tuple[int, int], ...]) -> None:
        labels = train.label[_within(train.label, ranges)]
        counts = np.bincount(labels, minlength=max(end for _, end in ranges))
        self.p = (counts + 1) / (len(labels) + sum(end - first for first, end in ranges))

    def nats(self, label: np.ndarray, left: np.ndarray) -> np.ndarray:
        return -np.log(self.p[label])


class _LeftBigram:
    """Counts (token, label) pairs by sorting, because an array of all pairs would have vocab_size^2 elements."""

    def __init__(self, train: _Labels, ranges: tuple[tuple[int, int], ...], vocab_size: int) -> None:
        chosen = _within(train.label, ranges)
        self._vocab_size = vocab_size
        self._unigram = _Unigram(train, ranges)
        self._left_counts = np.bincount(train.left[chosen], minlength=vocab_size)
        pairs, counts = np.unique(self._pair(train.label[chosen], train.left[chosen]), return_counts=True)
        # The added pair -1 equals no (token, label) pair. A search beyond the last real pair finds the pair -1, and thus
        # the count 0.
        self._pairs, self._pair_counts = np.append(pairs, -1), np.append(counts, 0)

    def _pair(self, label: np.ndarray, left: np.ndarray) -> np.ndarray:
        return left * self._vocab_size + label

    def nats(self, label: np.ndarray, left: np.ndarray) -> np.ndarray:
        pair = self._pair(label, left)
        at = np.searchsorted(self._pairs[:-1], pair)
        counts = np.where(self._pairs[at] == pair, self._pair_counts[at], 0)
        prior = BIGRAM_PRIOR * self._unigram.p[label]
        return -np.log((counts + prior) / (self._left_counts[left] + BIGRAM_PRIOR))


def _within(ids: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> np.ndarray:
    inside = np.zeros(len(ids), bool)
    for first, end in ranges:
        inside |= (ids >= first) & (ids < end)
    return inside
