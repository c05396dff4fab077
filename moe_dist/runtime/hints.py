"""Reads the hints (warnings) of a run from its metrics.jsonl. A run without hints, or of an earlier version, has none."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moe_dist.runtime.files import lines_from_end

SHOWN = 5  # largest number of hints shown with their texts at one place


class RecordedHint(NamedTuple):
    """The last hint of one kind. `text` is empty if only later lines of the file were read."""

    step: int
    kind: str
    text: str = ""


def read_hints(path: Path, *, most_bytes: int = 1 << 30) -> tuple[RecordedHint, ...]:
    """Returns the last hint of each kind, in the order of their steps. Reads the file backwards until every hint's text is
    found, but at most `most_bytes`. Types are checked, because another user may have written the file."""
    found: dict[str, RecordedHint] = {}
    missing: set[str] | None = None  # kinds whose text is not read yet; None before a step's line, which lists all kinds
    with contextlib.suppress(OSError):
        for text in lines_from_end(path, most_bytes=most_bytes):
            if missing is not None and not missing:
                break
            hint = b'"kind":"hint"' in text[:60]
            if not hint and (missing is not None or b'"kind":"step"' not in text[:60]):
                continue
            line = _mapping(text)
            kind, step, listed = line.get("hint"), line.get("step"), line.get("hints", {})
            if hint and isinstance(kind, str) and isinstance(step, int):
                if kind not in found or not found[kind].text:
                    found[kind] = RecordedHint(step, kind, str(line.get("text")))
                (missing or set()).discard(kind)
            elif line.get("kind") == "step" and isinstance(listed, dict):
                for kind, step in listed.items():
                    found.setdefault(kind, RecordedHint(int(step) if isinstance(step, int) else 0, kind))
                missing = {each.kind for each in found.values() if not each.text}
    return tuple(sorted(found.values()))


def warnings_text(hints: Sequence[RecordedHint]) -> str:
    """Returns the words that follow a run's state, such as ', with 2 warnings'. Empty without hints."""
    return f", with {len(hints)} warning{'s' * (len(hints) > 1)}" if hints else ""


def warning_lines(hints: Sequence[RecordedHint]) -> list[str]:
    """Returns a line for each of the last hints, the newest first."""
    lines = [f"step {each.step}: {each.text or each.kind}" for each in hints[: -SHOWN - 1 : -1]]
    return lines + ([f"and {len(hints) - SHOWN} more in metrics.jsonl"] if len(hints) > SHOWN else [])


def _mapping(text: bytes) -> dict:
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(text)
        return line if isinstance(line, dict) else {}
    return {}
