"""Reads and writes Megatron's indexed data sets without Megatron.

Megatron's readers do not detect damage. If a file is truncated or the disk fails, the memory-mapped reader ends the process
with SIGBUS, and the plain reader returns undefined memory. Importing Megatron also takes each rank 3 s. The reader below
calls `pread` on an open descriptor. A file that is replaced by a rename therefore stays readable, and each short or failed
read raises an error that names the file. Tests compare this reader and this writer with Megatron's.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from moe_dist.data.checked_file import CheckedFile
from moe_dist.data.picture_files import PictureRef, PictureRefs
from moe_dist.errors import DataError
from moe_dist.formats.index_header import index_paths, list_offsets, write_index
from moe_dist.formats.manifest import SplitSection
from moe_dist.formats.split_files import BITS, Bits, check_split

_UINT16_BELOW = 65500  # from this vocabulary size on, Megatron stores int32 (DType.optimal_dtype)


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], *, vocab_size: int) -> None:
    """Writes <prefix>.bin and <prefix>.idx as Megatron's builder does. Each document, integer [length], is one sequence."""
    dtype = np.dtype(np.uint16 if vocab_size < _UINT16_BELOW else np.int32)
    idx, bin_ = index_paths(Path(prefix))
    lengths = []
    with bin_.open("wb") as stream:
        for document in documents:
            stream.write(np.array(document, dtype).tobytes())
            lengths.append(len(document))
    write_index(idx, dtype, np.array(lengths, np.int32))


class IndexedSplit:
    """Gives random access to the tokens of one split.

    Attributes:
        starts_D, lengths_D: int64, index of each document's first token in the file, and each document's number of tokens.
        patches_D: int64, number of patches of each document's pictures.

    Raises:
        DataError: the files are damaged or disagree with the manifest.
        StorageError: the files cannot be read.
    """

    def __init__(self, folder: str | Path, split: SplitSection) -> None:
        self.header = check_split(folder, split)
        prefix = Path(folder) / split.path
        self.prefix = str(prefix)
        idx, bin_ = index_paths(prefix)
        self._tokens = CheckedFile(bin_)
        lengths_S, pointers_S, marks = self._lists(CheckedFile(idx))
        ends = np.concatenate([[0], np.cumsum(lengths_S, dtype=np.int64)])
        if not np.array_equal(pointers_S, ends[:-1] * self.header.itemsize):
            raise DataError(f"{self.prefix}.idx: the sequences do not follow one another without gaps; build it again")
        if marks[0] != 0 or (np.diff(marks) < 0).any():
            raise DataError(f"{self.prefix}.idx: the document marks do not rise from 0; build it again")
        self.starts_D = ends[marks[:-1]]
        self.lengths_D = np.diff(ends[marks])
        self._bits = {bits: CheckedFile(Path(folder) / file) for bits in BITS if (file := getattr(split, bits)) is not None}
        self._bit_bytes = -(-split.tokens // 8)
        self._refs = None if split.pictures is None else PictureRefs(Path(folder) / split.pictures, len(self.lengths_D))
        self.patches_D = np.zeros(len(self.lengths_D), np.int64) if self._refs is None else self._refs.patches_D

    def tokens(self, start: int, count: int) -> np.ndarray:
        """Returns the ids of `count` tokens, beginning with token `start` of the file, int64.

        Raises:
            DataError: the file was truncated after it was opened.
            StorageError: the file can no longer be read.
        """
        size = self.header.itemsize
        return np.frombuffer(self._tokens.read(start * size, count * size), self.header.dtype).astype(np.int64)

    def filler(self, start: int, count: int) -> np.ndarray:
        """Returns for each token whether it is filler (a picture cell that shows only background), bool. Without a filler
        file, all are False. Raises the errors of `tokens`."""
        return self._read_bits("filler", start, count)

    def prompt(self, start: int, count: int) -> np.ndarray:
        """Returns for each token whether it belongs to a prompt, bool. Without a prompt file, all are False. Raises the
        errors of `tokens`."""
        return self._read_bits("prompt", start, count)

    def document_of(self, start: np.ndarray | int) -> np.ndarray:
        """Returns the index of the document that has token `start` of the file."""
        return np.searchsorted(self.starts_D, start, side="right") - 1

    def pictures(self, start: int) -> Sequence[PictureRef]:
        """Returns the pictures of the document that has token `start` of the file."""
        return () if self._refs is None else self._refs.of(int(self.document_of(start)))

    def _read_bits(self, bits: Bits, start: int, count: int) -> np.ndarray:
        file = self._bits.get(bits)
        if file is None:
            return np.zeros(count, bool)
        first = start // 8
        begin = file.size - self._bit_bytes  # skips the header of an .npy file; raw bytes have no header
        raw = file.read(begin + first, -(-(start + count) // 8) - first)
        return np.unpackbits(np.frombuffer(raw, np.uint8))[start - 8 * first :][:count].astype(bool)

    def _lists(self, idx: CheckedFile) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the length and the byte offset of each sequence, and the index of each document's first sequence."""
        sequences, entries = self.header.sequences, self.header.documents + 1
        at_lengths, at_pointers, at_marks = list_offsets(sequences)
        return (
            np.frombuffer(idx.read(at_lengths, sequences * 4), np.int32),
            np.frombuffer(idx.read(at_pointers, sequences * 8), np.int64),
            np.frombuffer(idx.read(at_marks, entries * 8), np.int64),
        )
