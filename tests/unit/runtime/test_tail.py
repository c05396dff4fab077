"""Reads lines from the end of a file of any size."""

from pathlib import Path

import pytest

from moe_dist.runtime.files import BLOCK, lines_from_end


def read(path: Path, most_bytes: int = 1 << 30) -> list[bytes]:
    return list(lines_from_end(path, most_bytes=most_bytes))


@pytest.mark.parametrize(
    "lines",
    [[], [b""], [b"a"], [b"a", b"", b"b"], [b"x" * (BLOCK - 1), b"y", b"z" * (3 * BLOCK)], [b"x" * BLOCK] * 3],
)
def test_all_lines_the_last_first(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert read(path) == lines[::-1]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\n{'step': 3")
    assert read(path) == [b"two", b"one"]
    path.write_bytes(b"torn")
    assert read(path) == []


def test_no_further_back_than_asked_and_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first\nsecond\nthird\n")
    assert read(path, 15) == [b"third", b"second"]
    assert read(path, 12) == [b"third"]
    assert read(tmp_path / "none") == []
