"""Names in other people's files may contain terminal commands. All code that shows such names escapes the commands, and
shows only a part of a long text."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.contents import checksums_of, open_checkpoint
from moe_dist.checkpoint.verify import verify
from moe_dist.errors import LONGEST, DataError, MoeDistError, printable
from moe_dist.runtime.log import WithoutSecrets
from moe_dist.runtime.run_folder import RunFolder
from tests.support.invoked import invoke
from tests.support.small_run import SmallRun
from tools import inspect_checkpoint, verify_checkpoint

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e"


def safe(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_a_text_keeps_its_lines_and_loses_its_commands() -> None:
    assert printable(f"a\n\tb ünï 漢 {EVIL}") == f"a\n\tb ünï 漢 {ESCAPED}"
    assert printable("x" * LONGEST) == "x" * LONGEST
    assert printable("x" * (LONGEST + 1234)) == "x" * LONGEST + " ... (1,234 more characters)"


def test_an_error_is_safe_to_print_and_short() -> None:
    error = MoeDistError([EVIL, "y" * (1 << 20)], see="docs/checkpoints.md")
    assert safe(str(error))
    assert ESCAPED in str(error)
    assert len(str(error)) < 2 * LONGEST
    assert str(error).endswith("\nsee docs/checkpoints.md")
    assert error.problems[0] == ESCAPED


@pytest.mark.parametrize("problems", [[f"p{number}" for number in range(211)], "line\n" * 211])
def test_an_error_has_few_lines(problems: str | list[str]) -> None:
    error = DataError(problems)
    assert len(str(error).splitlines()) == 40
    assert " more lines" in str(error).splitlines()[-1]


def test_a_log_line_is_safe() -> None:
    record = logging.LogRecord("moe_dist", logging.WARNING, "", 0, "tensor %s", (EVIL,), None)
    assert WithoutSecrets("%(message)s").format(record) == f"tensor {ESCAPED}"


def test_a_summary_is_safe(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary(f"done {EVIL}\n")
    assert folder.read_summary() == f"done {ESCAPED}\n"


def renamed(folder: Path) -> None:
    """Writes the hostile name into all files of a checkpoint, as the name of a tensor, of values, of versions and of a
    group. Updates the files' digests."""
    shard = folder / "shard_00000.safetensors"
    content = shard.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = _with_evil(json.loads(content[8:begin]))
    for key in ("DCP_SHARDING_INFO", "fingerprints"):
        header["__metadata__"][key] = json.dumps(_with_evil(json.loads(header["__metadata__"][key])))
    raw = json.dumps(header).encode()
    raw = len(raw).to_bytes(8, "little") + raw
    shard.write_bytes(raw + content[begin:])
    index, state = (json.loads((folder / name).read_text()) for name in ("index.json", "state.json"))
    index["tensors"] = _with_evil(index["tensors"])
    index["shards"][0] = {"size": shard.stat().st_size, "header_sha256": hashlib.sha256(raw).hexdigest()}
    state["values"] = {EVIL: 1, "config": {"run": {"name": EVIL}}}
    state["versions"] = {EVIL: EVIL}
    state["placement"]["groups"][0]["name"] = EVIL
    files = {"index.json": json.dumps(index).encode(), "state.json": json.dumps(state).encode()}
    for name, text in {**files, "SHA256SUMS": checksums_of(files, state["save_id"])}.items():
        (folder / name).write_bytes(text)


def _with_evil(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("0.bias", f"0.{EVIL}"): value for name, value in values.items()}


def foreign(folder: Path) -> None:
    shutil.copy(folder / "shard_00000.safetensors", folder / f"shard_{EVIL.replace('/', '')}.safetensors")


@pytest.mark.parametrize("damage", [renamed, foreign])
def test_no_command_or_error_prints_a_name_raw(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = SmallRun(tmp_path).train(1).save(1)
    damage(folder)
    texts = [str(problem) for problem in verify(folder)[1]]
    try:
        open_checkpoint(folder)
    except DataError as error:
        texts.append(str(error))
    for module, *options in ((verify_checkpoint,), (inspect_checkpoint, "--tensors"), (inspect_checkpoint, "--config")):
        done = invoke(module.main, folder, *options)
        texts.append(done.output)
    assert any(r"\x1b" in text for text in texts), "the name should be shown"
    for text in texts:
        assert safe(text), text
