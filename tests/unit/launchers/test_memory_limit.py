"""The kernel counts the processes that a memory limit has killed. An increase of this count is reported once."""

from pathlib import Path

import pytest

from launchers import memory_limit
from launchers.memory_limit import MemoryLimit


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/job/7", "job/7/memory.events", "low 0\noom 1\noom_kill {}\noom_group_kill 0\n"),
        ("0::/job/7", "unified/job/7/memory.events", "oom_kill {}\n"),
        ("9:memory:/job", "memory/job/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
    ],
    ids=["version 2", "both versions", "version 1"],
)
def test_a_risen_count_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, file: str, text: str
) -> None:
    counts, cgroups = tmp_path / file, tmp_path / "cgroup"
    counts.parent.mkdir(parents=True)
    counts.write_text(text.format(3))
    cgroups.write_text(f"5:cpu:/\n{line}\n")
    monkeypatch.setattr(memory_limit, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory_limit, "OWN", cgroups)
    limit = MemoryLimit()
    assert limit.words() == ""
    counts.write_text(text.format(4))
    assert limit.words() == f"memory limit reached: oom_kill 4 in {counts}"
    assert limit.words() == ""
    counts.unlink()
    assert limit.words() == ""


def test_without_cgroups_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_limit, "OWN", tmp_path / "none")
    assert MemoryLimit().words() == ""
