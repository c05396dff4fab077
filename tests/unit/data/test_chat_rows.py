"""Several processes encode rows in batches. Tests interruption, slow batches and memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_dist.data import chat_rows
from moe_dist.data.chat import HubTokenizer
from moe_dist.data.chat_rows import Part, Row, encode_conversation
from moe_dist.data.corpus import Recipe
from moe_dist.data.prepare import Inputs, prepare
from moe_dist.errors import ConfigError, DataError
from moe_dist.runtime.progress import Report
from tests.support.chat_folders import chat_folder, conversations, write_lines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("tokenizer") / "chatml", "chatml")


def make(out: Path, lines: Path, tokenizer: Path, report: Report) -> dict[str, bytes]:
    out.parent.mkdir(exist_ok=True)
    prepare(out, Inputs(messages=str(lines)), Recipe(tokenizer=str(tokenizer)), report)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_command_goes_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """A restarted command keeps the batches that it has encoded if the file has not changed. Its data set equals the
    data set of an uninterrupted command."""
    monkeypatch.setattr(chat_rows, "_BATCH_ROWS", 10)
    lines, parts = write_lines(tmp_path / "lines.jsonl", conversations(100)), tmp_path / "b/.set.parts"
    reports: list[tuple[str, int, int]] = []
    during: dict[str, int] = {}

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}

    def interrupted(stage: str, done: int, total: int) -> None:
        reports.append((stage, done, total))
        if stage == "encode messages" and done > total / 2:
            raise KeyboardInterrupt

    def watched(stage: str, done: int, total: int) -> None:
        during.update(times() if stage == "count baselines" else {})

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b/set", lines, tokenizer, interrupted)
    assert [done for _, done, _ in reports] == sorted({done for _, done, _ in reports})
    assert {total for _, _, total in reports} == {lines.stat().st_size}
    kept = times()
    assert 4 <= len(kept) < 10
    if changed:
        write_lines(lines, conversations(100, seed=1))
    found = make(tmp_path / "b/set", lines, tokenizer, watched)
    assert (kept.items() <= during.items()) != changed
    assert found == make(tmp_path / "a/set", lines, tokenizer, lambda *_: None)
    assert not parts.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY"], ids=["empty", "no arrays", "no zip"])
def test_a_damaged_part_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "0.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"0\.npz: damaged"):
        chat_rows.Part.load(tmp_path / "0.npz")


class SlowChild:
    """Stands in for a process that exceeds its time limit on every batch of more than one row."""

    def __init__(self, hub: HubTokenizer) -> None:
        self._hub = hub

    def receive(self) -> Part:
        raise TimeoutError

    def __call__(self, rows: list[Row]) -> Part:
        assert len(rows) == 1
        return chat_rows._encoded(self._hub, encode_conversation, rows)  # pyright: ignore[reportPrivateUsage]


def test_rows_of_a_slow_batch_are_encoded_alone(tokenizer: Path) -> None:
    hub = HubTokenizer(tokenizer)
    batch: list[Row] = [(f"row {number}", row) for number, row in enumerate(conversations(20))]
    batch.append(("row 20", {"messages": []}))
    found = chat_rows._answer(SlowChild(hub), batch)  # pyright: ignore[reportPrivateUsage]
    wanted = chat_rows._encoded(hub, encode_conversation, batch)  # pyright: ignore[reportPrivateUsage]
    for name, value in vars(wanted).items():
        assert np.array_equal(getattr(found, name), value), name
    assert len(wanted.bad) == 1


PROGRAM = r"""
import re, sys
from pathlib import Path
from tests.unit.data.test_chat_rows import make
make(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), lambda *_: None)
# Not ru_maxrss, which begins with the memory of the process that started this one.
print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.full
def test_memory_does_not_grow_with_the_file(tmp_path: Path, tokenizer: Path) -> None:
    """With ten times as many rows, each MB by which the file grows adds less than 4 MiB of memory."""
    rows, used, sizes = conversations(1000), [], []
    for times in (1, 10):
        numbered = [
            {**row, "messages": [{"role": "system", "content": str(n)}, *row["messages"]]}
            for n in range(times)
            for row in rows
        ]
        lines = write_lines(tmp_path / f"{times}.jsonl", numbered)
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / f"{times}/set"), str(lines), str(tokenizer)]
        used.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        sizes.append(lines.stat().st_size / 1e6)
    assert used[1] - used[0] < 4 * (sizes[1] - sizes[0]), (used, sizes)
    assert json.loads((tmp_path / "10/set/manifest.json").read_text())["sources"]["messages"]["train"]["documents"] > 8000


def test_rows_that_are_each_just_under_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 500 rows that take 9 s each would show no progress for over an hour."""
    clock = iter((0.0, 2.0, 11.0, 19.0, 27.0, 36.0))

    class Slow:
        def receive(self) -> Part:
            raise TimeoutError

        def __call__(self, batch: list[Row]) -> list[Row]:
            return batch

    monkeypatch.setattr(chat_rows.time, "monotonic", lambda: next(clock))
    with pytest.raises(ConfigError, match=r"^row 1: .* took 9\.0 s, as long as thousands of usual rows, on this row"):
        chat_rows._answer(Slow(), [(f"row {number}", b"") for number in range(500)])
