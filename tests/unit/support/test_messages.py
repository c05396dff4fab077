"""The golden file of error texts detects a changed text, and has no text of a removed test."""

import json
import re

import pytest

from moe_dist.errors import ConfigError
from tests.support import messages
from tests.support.messages import GOLDEN, ROOT, refused


def test_a_changed_text_or_a_missing_key_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "tests/unit/support/test_messages.py::test_a_changed_text_or_a_missing_key_is_a_failure"
    monkeypatch.setattr(messages, "WRITE", False)
    monkeypatch.setattr(messages, "_golden", lambda: {case: "a.b: <root>/x", f"{case} #2": "a.b: old words"})
    with refused(ConfigError, "a.b"):
        raise ConfigError(f"a.b: {ROOT}/x")
    with pytest.raises(AssertionError, match="the text changed"), refused(ConfigError, "a.b"):
        raise ConfigError("a.b: new words")
    with pytest.raises(AssertionError, match="not in"), refused(ConfigError, "a.c"):
        raise ConfigError("a.b: new words")


def test_every_text_is_that_of_a_test() -> None:
    for case in json.loads(GOLDEN.read_text()):
        found = re.match(r"([\w/.]+)::(?:\w+::)?(\w+)", case)
        assert found, case
        assert f"def {found[2]}(" in (ROOT / found[1]).read_text(), f"{case} is gone: delete its text"
