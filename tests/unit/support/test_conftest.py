"""With CI=true, a skipped test that could have run fails."""

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport


def outcome_of(hook: Generator[None, Any, Any]) -> str:
    """Returns the outcome that a hook gives to the report of a skipped test or module."""
    next(hook)
    with pytest.raises(StopIteration) as ended:
        hook.send(SimpleNamespace(skipped=True, outcome="skipped", longrepr="x"))
    return ended.value.value.outcome


@pytest.mark.parametrize(("ci", "mark", "outcome"), [
    ("true", None, "failed"),
    ("true", "needs_hardware", "skipped"),
    ("", None, "skipped"),
])  # fmt: skip
def test_a_skip_is_a_failure_under_ci(monkeypatch: pytest.MonkeyPatch, ci: str, mark: str | None, outcome: str) -> None:
    monkeypatch.setenv("CI", ci)
    item: Any = SimpleNamespace(get_closest_marker=lambda name: name == mark or None)
    assert outcome_of(pytest_runtest_makereport(item, None)) == outcome  # pyright: ignore[reportArgumentType]
    if mark is None:
        assert outcome_of(pytest_make_collect_report(None)) == outcome  # pyright: ignore[reportArgumentType]
