"""We read indexed files that Megatron wrote, Megatron reads ours, and damaged or inconsistent files are refused."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moe_dist.data.indexed import IndexedSplit, write_indexed
from moe_dist.errors import DataError
from moe_dist.formats.manifest import SplitSection
from moe_dist.formats.split_files import check_split, count_by_modality, load_bits
from tests.support.messages import refused


def split(**changes: object) -> SplitSection:
    return SplitSection.model_validate({"path": "set.v1", "documents": 3, "tokens": 6} | changes)


@pytest.fixture
def theirs(tmp_path: Path, megatron: ModuleType) -> Path:
    """A data set that Megatron wrote. Document 0 has two sequences, document 1 has no sequence, and document 2 has one."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "set.v1.bin"), dtype=np.int32)
    for sequence in ([70_000, 1], [2]):
        builder.add_item(torch.tensor(sequence))
    builder.end_document()
    builder.end_document()
    builder.add_item(torch.tensor([3, 4, 5]))
    builder.end_document()
    builder.finalize(str(tmp_path / "set.v1.idx"))
    return tmp_path


@pytest.mark.megatron
def test_what_megatron_wrote_is_read(theirs: Path) -> None:
    data = IndexedSplit(theirs, split())
    assert data.starts_D.tolist() == [0, 3, 3]
    assert data.lengths_D.tolist() == [3, 0, 3]
    assert data.tokens(0, 6).tolist() == [70_000, 1, 2, 3, 4, 5]
    assert data.tokens(2, 2).tolist() == [2, 3]
    assert data.tokens(2, 2).dtype == np.int64
    assert not data.filler(0, 6).any()


@pytest.mark.megatron
@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_what_we_wrote_megatron_reads(tmp_path: Path, megatron: ModuleType, vocab_size: int, dtype: type) -> None:
    documents = [np.array([vocab_size - 1, 0]), np.array([7])]
    write_indexed(tmp_path / "ours", documents, vocab_size=vocab_size)
    dataset = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(dataset) == 2
    assert dataset.document_indices.tolist() == [0, 1, 2]
    for found, document in zip((dataset[0], dataset[1]), documents, strict=True):
        np.testing.assert_array_equal(found, document)
        assert found.dtype == dtype
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        assert (tmp_path / f"ours.{end}").read_bytes() == (tmp_path / f"theirs.{end}").read_bytes()


def test_filler_bits_of_any_run(tmp_path: Path) -> None:
    write_indexed(tmp_path / "f", [np.arange(30)], vocab_size=100)
    bits = np.random.default_rng(0).integers(0, 2, 30).astype(bool)
    np.save(tmp_path / "f.npy", np.packbits(bits))
    np.packbits(bits).tofile(tmp_path / "f.bits")
    for filler in ("f.npy", "f.bits"):
        data = IndexedSplit(tmp_path, split(path="f", documents=1, tokens=30, filler=filler))
        for start in range(30):
            for count in range(30 - start):
                assert data.filler(start, count).tolist() == bits[start : start + count].tolist()


def test_filler_of_another_length_is_refused(theirs: Path) -> None:
    np.save(theirs / "f.npy", np.zeros(2, np.uint8))
    with refused(DataError):
        load_bits(theirs, split(filler="f.npy"), "filler")
    with refused(DataError):
        check_split(theirs, split(filler="missing.npy"))


def test_sequences_with_gaps_are_refused(theirs: Path) -> None:
    idx = bytearray((theirs / "set.v1.idx").read_bytes())
    offsets = 34 + 3 * 4
    idx[offsets + 8 : offsets + 16] = np.int64(4).tobytes()  # the second sequence begins inside the first
    (theirs / "set.v1.idx").write_bytes(idx)
    with refused(DataError):
        IndexedSplit(theirs, split())


def test_count_by_modality(theirs: Path) -> None:
    ranges = {"text": ((0, 2), (4, 5)), "image": ((2, 4), (5, 80_000))}
    assert count_by_modality(theirs / "set.v1", ranges) == {"text": 2, "image": 4}
