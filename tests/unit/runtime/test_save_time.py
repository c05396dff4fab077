"""Tests the recorded durations of the last saves."""

from pathlib import Path

from moe_dist.runtime.status import SAVE_SECONDS, measured_save_seconds, record_save_seconds


def test_the_longest_of_the_last_saves(tmp_path: Path) -> None:
    assert measured_save_seconds(tmp_path) is None
    for seconds in (900.0, 1.25, 3.5, 2.0, 1.0, 1.0):
        record_save_seconds(tmp_path, seconds)
    assert measured_save_seconds(tmp_path) == 3.5, "the first one is no longer among the last five"


def test_a_damaged_file_counts_as_none_and_is_replaced(tmp_path: Path) -> None:
    for content in ("[1.0, 2", "{}", '["a", null]', f"[1e999, -5, {10**400}]"):
        (tmp_path / SAVE_SECONDS).write_text(content)
        assert measured_save_seconds(tmp_path) is None
    record_save_seconds(tmp_path, 2.0)
    assert measured_save_seconds(tmp_path) == 2.0
