"""Rows are encoded in batches by several processes: interruption, progress and memory."""

from pathlib import Path

import pytest

from moe_dist.data import chat_rows
from moe_dist.data.corpus import Recipe
from moe_dist.data.prepare import Inputs, prepare
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
    """Encoded batches are kept if the file is the same. The data set equals one that was made at once."""
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
