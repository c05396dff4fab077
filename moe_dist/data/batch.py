"""Defines a micro-batch, which has token ids, labels, and each token's document and modality.

Shape letters: B is the number of sequences in a micro-batch, S the number of tokens in a sequence.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moe_dist.data.picture_files import PictureRef
from moe_dist.errors import DataError

WORDS = 61  # a prime, so that a shift of all ids changes their counts
LONG_DOCUMENT = 16  # tokens of a document that two sources hardly share by chance
IGNORED = -100  # label of a position without loss; equals the default ignore_index of torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank. All tensors have the shape [B, S]."""

    tokens_BS: torch.Tensor  # int64, input ids; pad_id at padding
    # int64, the next token of the same document; IGNORED if the position is padding or the last token of a document, or if
    # the next token belongs to a prompt
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor  # int64, positions, which restart at 0 at each document or piece of a document
    # int32, index of the token's document in its sequence. A token attends only to tokens of its own document. All padding
    # of a sequence counts as one additional document.
    documents_BS: torch.Tensor
    modality_BS: torch.Tensor  # int64, modality of the input token, as index into tuple(manifest.modalities)
    label_modality_BS: torch.Tensor  # int64, modality of the label; 0 if there is no label
    filler_BS: torch.Tensor  # bool, true if the next token is filler (a picture cell that shows only background)
    padding_BS: torch.Tensor  # bool, true if the position is padding

    def to(self, device: torch.device | str) -> "Batch":
        """Returns a copy of this batch on another device. For CUDA, copies all tensors at once from pinned memory."""
        tensors = {field.name: getattr(self, field.name) for field in fields(Batch)}
        if torch.device(device).type != "cuda":
            return Batch(**{name: each.to(device) for name, each in tensors.items()})
        # Tensors with larger elements come first, so that each tensor begins at a multiple of its element size.
        order = sorted(tensors, key=lambda name: -tensors[name].element_size())
        flat = [tensors[name].reshape(-1).view(torch.uint8) for name in order]
        packed = torch.cat(flat).pin_memory().to(device, non_blocking=True).split([len(each) for each in flat])
        moved = zip(order, packed, strict=True)
        return Batch(**{name: each.view(tensors[name].dtype).view(tensors[name].shape) for name, each in moved})

    def choices(self) -> torch.Tensor | None:
        """Returns the vocabulary words to which the loss of each sequence's labels is restricted, int64 [B, K] as in
        `model.objective.Choices`; None if the loss uses all words."""
        return None

    def family_inputs(self) -> Mapping[str, torch.Tensor] | None:
        """Returns further inputs of a transformers model's forward, by name (`picture_batch.PictureBatch`), or None."""
        return None

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens that are not padding. On CUDA this costs a host sync."""
        return int((~self.padding_BS).sum())


@dataclass(frozen=True)
class Segment:
    """A piece of a document, as it was read from disk."""

    tokens: np.ndarray  # int64 [length]; if the document continues, [length + 1], where the last token is only a label
    filler: np.ndarray  # bool per token, true for filler (a picture cell that shows only background)
    length: int  # number of input tokens
    prompt: np.ndarray | None = None  # bool per token, true for a token that is no label; None if all tokens are labels
    pictures: Sequence[PictureRef] = ()  # the pictures of the placeholder tokens, in order


class BatchMaker:
    """Makes a `Batch` from segments.

    Args:
        seq_len: Number of tokens in a sequence (S).
        pad_id: Token id of padding.
        modalities: Id ranges [first, last + 1] of each modality. Together they cover the vocabulary.
    """

    def __init__(self, *, seq_len: int, pad_id: int, modalities: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self._modality_of_id = np.zeros(max(end for ranges in modalities for _, end in ranges), np.int64)
        for modality, ranges in enumerate(modalities):
            for first, end in ranges:
                self._modality_of_id[first:end] = modality

    def make(self, sequences: Sequence[Sequence[Segment]]) -> Batch:
        """Makes a batch whose row i contains the segments in sequences[i]. An empty list gives a row of padding. Raises
        DataError if an id is outside the vocabulary."""
        shape = (len(sequences), self.seq_len)
        tokens, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        positions, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
        filler, padding = np.zeros(shape, bool), np.ones(shape, bool)
        for row, segments in enumerate(sequences):
            at = 0
            for document, segment in enumerate(segments):
                end, scored = at + segment.length, at + len(segment.tokens) - 1
                tokens[row, at:end] = segment.tokens[: segment.length]
                read = False if segment.prompt is None else segment.prompt[1:]
                labels[row, at:scored] = np.where(read, IGNORED, segment.tokens[1:])
                filler[row, at:scored] = segment.filler[1:]
                positions[row, at:end] = np.arange(segment.length)
                documents[row, at:end] = document
                padding[row, at:end] = False
                at = end
            positions[row, at:] = np.arange(self.seq_len - at)
            documents[row, at:] = len(segments)
        self._check(tokens, labels)
        label_modality = np.where(labels == IGNORED, 0, self._modality_of_id[np.maximum(labels, 0)])
        arrays = (tokens, labels, positions, documents, self._modality_of_id[tokens], label_modality, filler, padding)
        return Batch(*(torch.from_numpy(array) for array in arrays))  # the tensors share the arrays' memory

    def count(self, segments: Sequence[Segment]) -> tuple[list[int], np.ndarray, list[int]]:
        """Returns the length of each segment, the number of input tokens of each modality, int64 [M], and the number of
        patches of each picture."""
        inputs = np.concatenate([each.tokens[: each.length] for each in segments])
        inputs = inputs.clip(0, len(self._modality_of_id) - 1)  # `make` rejects ids outside the vocabulary
        modalities = int(self._modality_of_id.max()) + 1
        patches = [ref.patches for each in segments for ref in each.pictures]
        return [each.length for each in segments], np.bincount(self._modality_of_id[inputs], minlength=modalities), patches

    def _check(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        vocab_size = len(self._modality_of_id)
        low, high = int(tokens.min()), max(int(tokens.max()), int(labels.max()))
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} in the data is outside the manifest's vocab_size={vocab_size}; "
                "the manifest belongs to other data, or vocab_size and modalities must be raised"
            )


def checksum(batches: Sequence[Batch]) -> int:
    """Returns a checksum of the token ids of all micro-batches, which are on the host as a loader makes them. It has 48
    bits, so that float64 represents it exactly."""
    digest = hashlib.blake2b(digest_size=6)
    for batch in batches:
        digest.update(batch.tokens_BS.cpu().contiguous().numpy().data)
    return int.from_bytes(digest.digest())


def count_words(batches: Sequence[Batch]) -> np.ndarray:
    """Returns the number of token ids, float64 [WORDS], by the id modulo WORDS. The batches are on the host."""
    ids = [batch.tokens_BS[~batch.padding_BS].cpu().numpy() % WORDS for batch in batches]
    return np.bincount(np.concatenate(ids), minlength=WORDS).astype(np.float64)


def whole_documents(batches: Sequence[Batch]) -> set[int]:
    """Returns a hash of each document of `LONG_DOCUMENT` tokens or more. Batches with pictures have none."""
    found = set[int]()
    for batch in batches if all(type(each) is Batch for each in batches) else ():  # a subclass may have pictures
        for tokens_S, documents_S, padding_S in zip(
            batch.tokens_BS.numpy(), batch.documents_BS.numpy(), batch.padding_BS.numpy(), strict=True
        ):
            parts = np.split(tokens_S, np.flatnonzero(np.diff(documents_S)) + 1)
            parts = parts[: -1 if padding_S[-1] else None]
            found |= {hash(part.tobytes()) for part in parts if len(part) >= LONG_DOCUMENT}
    return found
