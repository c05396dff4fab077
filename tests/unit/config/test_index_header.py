"""The torch-free reader of Megatron's .idx files reads files that the tests write by hand."""

import struct
from pathlib import Path

import numpy as np
import pytest

from moe_dist.errors import DataError
from moe_dist.formats.index_header import largest_id, read_index_header
from tests.support.messages import refused


def write_pair(prefix: Path, documents: list[list[int]], dtype: str = "uint16", code: int = 8) -> Path:
    """Writes .idx and .bin by the published layout, one sequence per document."""
    lengths = np.array([len(d) for d in documents], np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64))) * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(documents), len(documents) + 1)
    starts = np.arange(len(documents) + 1, dtype=np.int64)
    idx = head + lengths.tobytes() + offsets.astype(np.int64).tobytes() + starts.tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(np.array(d, dtype).tobytes() for d in documents))
    return prefix


def test_reads_counts_and_largest_id(tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "text.v1", [[1, 2, 3], [4607], [5, 0]])
    header = read_index_header(prefix)
    assert (header.documents, header.sequences, header.tokens) == (3, 3, 6)
    assert (header.dtype, header.itemsize, header.bin_bytes) == ("uint16", 2, 12)
    assert largest_id(prefix) == 4607


def test_large_files_are_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dist.formats.index_header._BLOCK_BYTES", 4)
    prefix = write_pair(tmp_path / "d", [[1, 1, 9, 9, 3, 7]])
    assert largest_id(prefix) == 9
    assert largest_id(prefix, max_bytes=8) == 7  # reads only the first and the last block


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda idx, bin_: bin_.unlink(), "missing"),
        (lambda idx, bin_: idx.write_bytes(idx.read_bytes()[:-1]), "cut short"),
        (lambda idx, bin_: idx.write_bytes(idx.read_bytes()[:20]), "cut short inside its header"),
        (lambda idx, bin_: idx.write_bytes(b"PK\x03\x04" + bytes(100)), "not a Megatron index"),
        (lambda idx, bin_: idx.write_bytes(idx.read_bytes()[:17] + b"\x63" + idx.read_bytes()[18:]), "type code 99"),
        (lambda idx, bin_: idx.write_bytes(idx.read_bytes()[:-8] + bytes(8)), "contradict"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, words: str) -> None:
    prefix = write_pair(tmp_path / "d", [[1, 2, 3], [4]])
    damage(tmp_path / "d.idx", tmp_path / "d.bin")
    with pytest.raises(DataError, match=words):
        read_index_header(prefix)


def test_negative_and_float_ids_are_refused(tmp_path: Path) -> None:
    with refused(DataError):
        largest_id(write_pair(tmp_path / "n", [[1, -5]], "int32", 4))
    with refused(DataError):
        largest_id(write_pair(tmp_path / "f", [[1, 2]], "float32", 7))
