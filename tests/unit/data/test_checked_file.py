"""A data file that shrinks, fails or disappears while it is open causes an error that names it."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data.checked_file import CheckedFile
from moe_dist.data.indexed import IndexedSplit, write_indexed
from moe_dist.errors import DataError, StorageError
from moe_dist.formats.manifest import SplitSection
from tests.support.messages import refused


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(range(100)))
    return path


def test_a_file_cut_short_while_it_is_open_is_named(path: Path) -> None:
    file = CheckedFile(path)
    os.truncate(path, 60)
    assert file.read(0, 60) == bytes(range(60))
    with refused(DataError, "data.bin"):
        file.read(50, 20)


def test_reads_that_come_in_parts_are_put_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: whole(fd, min(count, 7), offset))
    assert CheckedFile(path).read(10, 50) == bytes(range(10, 60))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_failing_disk_and_a_lost_file_system_are_named(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    file = CheckedFile(path)

    def fail(*_: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StorageError, match=rf"data\.bin: cannot be read: {os.strerror(number)}") as caught:
        file.read(0, 1)
    assert (caught.value.exit_code, caught.value.retry) == (1, True)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with refused(StorageError, "absent.bin"):
        CheckedFile(tmp_path / "absent.bin")


@pytest.mark.parametrize("what", ["bin", "filler"])
def test_a_split_that_is_cut_short_while_the_run_reads_it(tmp_path: Path, what: str) -> None:
    write_indexed(tmp_path / "set", [np.arange(64)], vocab_size=100)
    np.packbits(np.ones(64, bool)).tofile(tmp_path / "set.filler")
    split = IndexedSplit(tmp_path, SplitSection(path="set", documents=1, tokens=64, filler="set.filler"))
    assert split.tokens(60, 4).tolist() == [60, 61, 62, 63]
    assert split.filler(60, 4).all()
    os.truncate(tmp_path / f"set.{what}", 4)
    with pytest.raises(DataError, match=rf"set\.{what}: 4 bytes"):
        split.filler(60, 4) if what == "filler" else split.tokens(60, 4)
