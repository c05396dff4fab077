"""Megatron's indexed data sets: the only file that imports megatron.core.datasets.

The import takes seconds and pulls in Megatron's model code, so it happens at the first use and not before.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np

from moe_dist.config.manifest import SplitSection
from moe_dist.config.split_files import check_split, load_filler
from moe_dist.errors import DataError

_UINT16_BELOW = 65500  # Megatron's own bound (DType.optimal_dtype)


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type that ids below `vocab_size` are stored in, by Megatron's rule."""
    return np.uint16 if vocab_size < _UINT16_BELOW else np.int32


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], *, vocab_size: int) -> None:
    """Writes <prefix>.bin and <prefix>.idx with Megatron's builder, one sequence a document.

    Args:
        documents: Token ids of each document, integer [length].
    """
    builder = _megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(vocab_size))
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


class IndexedSplit:
    """Random access to the tokens of one split; a document is what Megatron's index calls one.

    Attributes:
        starts_D, lengths_D: int64, first token (counted over the whole file) and number of tokens of each document.

    Raises:
        DataError: the files are damaged or disagree with the manifest.
    """

    def __init__(self, folder: str | Path, split: SplitSection) -> None:
        self.header = check_split(folder, split)
        self.prefix = str(Path(folder) / split.path)
        self._dataset = _megatron().IndexedDataset(self.prefix)
        ends = np.concatenate([[0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)])
        marks = self._dataset.document_indices
        if not np.array_equal(self._dataset.index.sequence_pointers, ends[:-1] * self.header.itemsize):
            raise DataError(f"{self.prefix}.idx: the sequences do not follow one another without gaps; build it again")
        if marks[0] != 0 or (np.diff(marks) < 0).any():
            raise DataError(f"{self.prefix}.idx: the document marks do not rise from 0; build it again")
        self.starts_D = ends[marks[:-1]]
        self.lengths_D = np.diff(ends[marks])
        self._filler = load_filler(folder, split)

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token `start` of the file on, int64."""
        dtype, offset = np.dtype(self.header.dtype).type, start * self.header.itemsize
        return self._dataset.bin_reader.read(dtype=dtype, count=count, offset=offset).astype(np.int64)

    def filler(self, start: int, count: int) -> np.ndarray:
        """Filler bits of the same tokens, bool; all False where the split has none."""
        if self._filler is None:
            return np.zeros(count, bool)
        first = start // 8
        bits = np.unpackbits(self._filler[first : -(-(start + count) // 8)])
        return bits[start - 8 * first :][:count].astype(bool)


def _megatron() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells that Transformer Engine and Apex are absent, which matters not here
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
