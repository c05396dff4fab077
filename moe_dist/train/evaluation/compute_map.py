"""Counts the true experts of each token in some held-out pictures and lines of text, and computes the mean number of true
experts for each kind of token.

Shape letters: B sequences, S positions, T = B x S tokens, L MoE layers, K choices, M modalities.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_dist.comm.collectives import sum_over
from moe_dist.comm.names import MAPPED_EXPERTS
from moe_dist.data.batch import Batch
from moe_dist.data.codebook import load_codebook
from moe_dist.formats.manifest import Manifest
from moe_dist.formats.tokenizer_file import read_tokenizer
from moe_dist.model.transformer import Transformer
from moe_dist.moe.routing.types import LayerReport, RoutingRequest
from moe_dist.monitor.statistics import ComputeMap, MappedPicture
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.objective.loss import forward

T = TypeVar("T")
SHORTEST_LINE, LONGEST_LINE = 12, 100  # characters of a line of text in the map
IDS_IN_A_LINE = 16  # number of tokens of a line in the map if the data have no tokenizer


@dataclass(frozen=True)
class Mapper:
    """Makes the compute map of a model.

    Attributes:
        sequences: Number of held-out sequences of each source that are routed.
        pictures, lines: Number of pictures, and of lines of text, that the map takes from rank 0's sequences.
    """

    folder: Path
    manifest: Manifest
    groups: Sequence[ExpertGroup]
    sequences: int
    pictures: int
    lines: int
    _codebook: np.ndarray | None = field(init=False)
    _tokenizer: Tokenizer | None = field(init=False)

    def __post_init__(self) -> None:
        """Reads codebook and tokenizer at the start of the run. Raises DataError if this fails."""
        image, tokenizer = self.manifest.image, self.manifest.tokenizer
        codebook = None if image is None or image.codebook is None else load_codebook(self.folder / image.codebook)
        object.__setattr__(self, "_codebook", codebook)
        object.__setattr__(self, "_tokenizer", None if tokenizer is None else read_tokenizer(self.folder / tokenizer))

    @torch.no_grad()
    def __call__(
        self, model: Transformer, batches: Sequence[Batch], *, group_of_modality: Tensor, mesh: Mesh
    ) -> ComputeMap | None:
        """Routes held-out batches. Returns the map on rank 0, and None on other ranks. Collective. Costs a forward pass of
        each batch, with its all-to-alls, and one sum over the ranks."""
        device, names = group_of_modality.device, tuple(self.manifest.modalities)
        sums_2MF = torch.zeros(
            2, len(names), 2, dtype=torch.float64, device=device
        )  # axes: (sum of true experts, number of tokens); modality; (other token, filler)
        seen: list[tuple[Batch, np.ndarray]] = []
        training = model.training
        model.eval()
        for batch in batches:
            on_device = batch.to(device)
            _, reports = forward(model, on_device, group_of_modality, RoutingRequest(keep_choices=True))
            experts_BS = true_experts(reports, sum(group.num_experts for group in self.groups)).view(batch.tokens_BS.shape)
            sums_2MF += _sums(experts_BS, on_device, len(names))  # ranks with the same sequences add equal sums
            if mesh.rank == 0:
                seen.append((batch, experts_BS.cpu().numpy()))  # host sync
        model.train(training)
        sums_2MF = sum_over(sums_2MF, mesh.world, name=MAPPED_EXPERTS, tracker=mesh.tracker).cpu().numpy()
        if mesh.rank != 0 or not sums_2MF.any():  # no tokens, because the data have no held-out part
            return None
        usual = max(min(group.top_k, group.num_experts) for group in self.groups)
        drawn = _draw([each for pair in seen for each in _pictures(*pair, self.manifest)], self.pictures)
        return ComputeMap(
            mean=mean_by_kind(sums_2MF, names),
            most=max([usual, *(math.ceil(experts_BS.max()) for _, experts_BS in seen)]),  # above `usual` if experts choose
            pictures=[MappedPicture(experts, empty, self._pixels(codes)) for codes, experts, empty in drawn],
            lines=self._lines(seen),
        )

    def _pixels(self, codes: np.ndarray) -> np.ndarray | None:
        if self._codebook is None:
            return None
        rows, columns = codes.shape
        patch = self._codebook.shape[1]
        patches = self._codebook[codes.clip(0, len(self._codebook) - 1)]  # [rows, columns, patch, patch, 3]
        return patches.transpose(0, 2, 1, 3, 4).reshape(rows * patch, columns * patch, 3)

    def _lines(self, seen: Sequence[tuple[Batch, np.ndarray]]) -> list[list[tuple[str, float]]]:
        """Returns consecutive lines of a text document. If it has too few lines, continues with other text documents."""
        texts = [text for batch, experts in seen for text in _texts(batch, experts, self.manifest)]
        lines: list[list[tuple[str, float]]] = []
        for tokens, experts in _draw(texts, len(texts)):
            if len(lines) >= self.lines:
                break
            lines += [line for line in self._split(tokens, experts) if len("".join(t for t, _ in line)) >= SHORTEST_LINE]
        return lines[: self.lines]

    def _split(self, tokens: np.ndarray, experts: np.ndarray) -> Iterator[list[tuple[str, float]]]:
        """Splits a text into lines. A token that contains a line break belongs to both lines."""
        line: list[tuple[str, float]] = []
        for number, (token, load) in enumerate(zip(tokens.tolist(), experts.tolist(), strict=True)):
            if self._tokenizer is None:
                text = f"{token} " + "\n" * ((number + 1) % IDS_IN_A_LINE == 0)
            else:
                text = self._tokenizer.decode([token], skip_special_tokens=False).replace("\t", "    ")
            first, *others = text.split("\n")
            line += [(first, load)] if first else []
            for other in others:
                yield _cut(line)
                line = [(other, load)] if other else []
        yield _cut(line)


def _draw(found: Sequence[T], count: int) -> list[T]:
    """Draws `count` items at random. Every evaluation draws the same items, because the draw's seed is fixed."""
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))[:count]]


def true_experts(reports: Sequence[LayerReport], num_experts: int) -> Tensor:
    """Returns the mean over layers of each token's number of true experts, float64 [T]. Dropped pairs do not count."""
    chosen = [report.chosen for report in reports if report.chosen is not None]
    ids_LTK = torch.stack([each.column_TK for each in chosen])
    return ((ids_LTK >= 0) & (ids_LTK < num_experts)).sum(2).to(torch.float64).mean(0)


def _filler(batch: Batch) -> Tensor:
    """Returns whether each token is a background cell, [B, S]. `Batch.filler_BS` marks the position before such a cell."""
    filler_BS = torch.zeros_like(batch.filler_BS)
    filler_BS[:, 1:] = batch.filler_BS[:, :-1] & (batch.positions_BS[:, 1:] > 0)
    return filler_BS


def _sums(experts_BS: Tensor, batch: Batch, num_modalities: int) -> Tensor:
    """Returns sums of the numbers of true experts [0] and of tokens [1], by modality and filler: float64 [2, M, 2]."""
    kind_T = torch.where(batch.padding_BS, 2 * num_modalities, 2 * batch.modality_BS + _filler(batch)).flatten()
    values_2T = torch.stack([experts_BS.flatten(), torch.ones_like(experts_BS).flatten()])
    member = (kind_T[:, None] == torch.arange(2 * num_modalities, device=kind_T.device)).to(torch.float64)
    return (values_2T @ member).view(2, num_modalities, 2)


def mean_by_kind(sums_2MF: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Returns the mean number of true experts for each kind of token. If several modalities have background cells, the
    names of the kinds of picture cells contain the modality."""
    experts_MF, tokens_MF = sums_2MF
    several, found = (tokens_MF[:, 1] > 0).sum() > 1, {}
    for name, experts_F, tokens_F in zip(names, experts_MF, tokens_MF, strict=True):
        of = f" of {name}" if several else ""
        kinds = (f"drawn cells{of}" if tokens_F[1] else name, f"background{of}")
        found |= {kind: float(e / t) for kind, e, t in zip(kinds, experts_F, tokens_F, strict=True) if t}
    return found


def _documents(batch: Batch) -> Iterator[tuple[int, slice]]:
    """Yields, for each document or piece of a document, the index of its sequence in the batch and its positions."""
    for row, (starts, padding) in enumerate(zip(batch.positions_BS.numpy() == 0, batch.padding_BS.numpy(), strict=True)):
        length = int((~padding).sum())  # padding is at the end
        edges = [*np.flatnonzero(starts[:length]).tolist(), length]
        yield from ((row, slice(first, end)) for first, end in pairwise(edges))


def _pictures(
    batch: Batch, experts_BS: np.ndarray, manifest: Manifest
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields, for each whole picture, its codes, numbers of true experts and background flags, each [rows, columns]."""
    image = manifest.image
    if image is None:
        return
    cells, firsts = image.grid[0] * image.grid[1], [ranges[0][0] for ranges in manifest.modalities.values()]
    tokens_BS, modality_BS, filler_BS = batch.tokens_BS.numpy(), batch.modality_BS.numpy(), _filler(batch).numpy()
    for row, document in _documents(batch):
        tokens = tokens_BS[row, document]
        for begin in np.flatnonzero(tokens == image.begin_id).tolist():
            at = slice(document.start + begin + 1, document.start + begin + 1 + cells)
            if begin + 1 + cells < len(tokens) and tokens[begin + 1 + cells] == image.end_id:
                codes = tokens_BS[row, at] - firsts[modality_BS[row, at.start]]
                parts = (codes, experts_BS[row, at], filler_BS[row, at])
                yield tuple(part.reshape(image.grid) for part in parts)  # pyright: ignore[reportReturnType]


def _texts(batch: Batch, experts_BS: np.ndarray, manifest: Manifest) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the tokens of each text document, or piece of one, and the number of true experts of each token. A text
    document has no picture, and all its tokens have the modality of `eos_id`."""
    tokens_BS, modality_BS = batch.tokens_BS.numpy(), batch.modality_BS.numpy()
    (text,) = (
        index
        for index, ranges in enumerate(manifest.modalities.values())
        if any(first <= manifest.eos_id < end for first, end in ranges)
    )
    for row, document in _documents(batch):
        tokens = tokens_BS[row, document]
        pictures = manifest.image is not None and (tokens == manifest.image.begin_id).any()
        if not pictures and (modality_BS[row, document] == text).all():
            yield tokens, experts_BS[row, document]


def _cut(line: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Returns the first tokens of a line, up to LONGEST_LINE characters."""
    ends = np.cumsum([len(text) for text, _ in line])
    return [token for token, end in zip(line, ends, strict=True) if end <= LONGEST_LINE]
