"""Reads tokenizer.json with the library tokenizers, whose Rust code parses the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from tokenizers import Tokenizer

from moe_dist.config.regular_file import read_regular
from moe_dist.config.timed import TimedCalls
from moe_dist.errors import DataError

MAX_BYTES = 1 << 27  # largest size of a tokenizer file; the largest known files have 35 MB
MAX_ADDED_BYTES = 1 << 23  # of all added tokens, for which the library builds an automaton: 0.3 s and 80 MB for each MB


@dataclass
class _AddedToken:
    content: str
    normalized: bool = True


@dataclass
class _Parts:
    added_tokens: list[_AddedToken] | None = None
    normalizer: Any = None


_PARTS = TypeAdapter(_Parts)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Reads any tokenizer of the library tokenizers. Raises DataError if the file is missing, too large or damaged."""
    with tokenizer_errors(f"tokenizer {str(path)!r}: must be a tokenizer.json of Hugging Face, or one of prepare-data"):
        return Tokenizer.from_buffer(checked_tokenizer(Path(path)))


def checked_tokenizer(path: Path) -> bytes:
    """Returns the content of a tokenizer.json. Raises OSError if it cannot be read, and ValueError if it is damaged, or
    if its added tokens are too long or take too much time."""
    content = read_regular(path, most_bytes=MAX_BYTES)
    parts = _PARTS.validate_json(content)
    tokens = parts.added_tokens or []
    if (added := sum(len(token.content) for token in tokens)) > MAX_ADDED_BYTES:
        raise ValueError(f"its added_tokens have {added:,} characters, and at most {MAX_ADDED_BYTES:,} are read")
    if any(token.normalized for token in tokens) and "Regex" in str(parts.normalizer):
        try:
            TimedCalls(_load, seconds=5)(content)
        except (TimeoutError, ChildProcessError, MemoryError) as error:
            problem = f"the normalizer's regular expressions fail on its added tokens ({error}); remove either"
            raise ValueError(problem) from error
    return content


def _load(content: bytes) -> None:
    Tokenizer.from_buffer(content)


@contextmanager
def tokenizer_errors(problem: str) -> Iterator[None]:
    """Turns every error of the library tokenizers in the with block into a DataError whose text begins with `problem`. The
    library raises plain Exceptions, and a panic of its Rust code is not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        why = error.strerror if isinstance(error, OSError) else f"{error!s:.200}"
        raise DataError(f"{problem}: {why}") from error
