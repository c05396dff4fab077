"""Compares the texts of errors with one golden file. A test asserts the class of an error and the keys that its text
names; the file has the whole text.

    with refused(ConfigError, "train.steps=0"):
        load_config(path)

`tests/data/messages.json` maps each case to the whole text. A case is the name of a test, with a number if the test
meets several errors. After a change of words, run the tests with MESSAGES=write and read the diff.
"""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from pydantic import ValidationError

GOLDEN = Path(__file__).parents[1] / "data" / "messages.json"
ROOT = GOLDEN.parents[2]
# Patterns for the parts of a text that differ between machines or runs.
_PASSING = (
    (re.compile(re.escape(str(ROOT))), "<root>"),
    (re.compile(r"(/[\w.-]+)*/pytest-of-\w+/pytest-\d+/(popen-gw\d+/)?[^/\s'\"`;:,]+"), "<tmp>"),
    (re.compile(r"\bpid \d+"), "pid <pid>"),
    (re.compile(r"\bprocess \d+ on [\w.-]+"), "process <pid> on <host>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"), "<time>"),
    (re.compile(r"\b[0-9a-f]{32,64}\b"), "<hash>"),
    (re.compile(r"\.[0-9a-f]{8}(?=')"), ".<token>"),
    (re.compile(r"/tmp/moe_dist_test_\w+"), "<tmp>"),
    (re.compile(r"\b\w+ \(uid \d+\)"), "<user>"),
    (re.compile(re.escape(socket.gethostname())), "<host>"),
    (re.compile(r"0x[0-9a-f]{6,}"), "<address>"),
)
WRITE = os.environ.get("MESSAGES") == "write"
_met: dict[str, int] = {}  # number of errors that each test has met
_new: dict[str, str] = {}


@contextmanager
def refused(error: type[Exception], *keys: str, golden: bool = True) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """Asserts that the block raises `error`, that its text contains all `keys`, and that the golden file has the text.

    Args:
        golden: False if the text comes from another package, or differs between runs.
    """
    with pytest.raises(error) as raised:
        yield raised
    text = _text(raised.value)
    missing = [key for key in keys if key not in str(raised.value)]
    assert not missing, f"{missing} not in: {text}"
    if golden:
        hold(text)


def _text(error: Exception) -> str:
    """Returns the places and messages of a pydantic error, or the text of another error. The rest of pydantic's text
    shortens long values, such as paths, in the middle."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "\n".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())


def hold(text: str) -> None:
    """Asserts that the golden file has this text for the running test. With MESSAGES=write, writes it to the file."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
    _met[test] = number = _met.get(test, 0) + 1
    case = test if number == 1 else f"{test} #{number}"
    for pattern, name in _PASSING:
        text = pattern.sub(name, text)
    if WRITE:
        _new[case] = text
    else:
        assert text == _golden().get(case), f"{case}: the text changed; after reading it, run the test with MESSAGES=write"


@cache
def _golden() -> dict[str, str]:
    return json.loads(GOLDEN.read_text())


def write_new() -> None:
    """Writes the new texts at the end of a session or worker, because a running test may forbid writes."""
    if not _new:
        return
    with GOLDEN.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        texts = (json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}) | _new
        GOLDEN.write_text(json.dumps(dict(sorted(texts.items())), indent=1, ensure_ascii=False) + "\n")
