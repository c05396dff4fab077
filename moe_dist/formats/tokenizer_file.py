"""Reads tokenizer.json with the library tokenizers, whose Rust code parses the file."""

from collections.abc import Callable, Iterator
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
MAX_TEMPLATE_BYTES = 1 << 20  # largest size of a chat template


@dataclass
class _AddedToken:
    content: str


@dataclass
class _Parts:
    added_tokens: list[_AddedToken] | None = None


_PARTS = TypeAdapter(_Parts)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Reads any tokenizer of the library tokenizers. Raises DataError if the file is missing, too large or damaged."""
    with tokenizer_errors(f"tokenizer {str(path)!r}: must be a tokenizer.json of Hugging Face, or one of prepare-data"):
        tokenizer = Tokenizer.from_buffer(checked_tokenizer(Path(path)))
        tokenizer.no_padding()  # the file may ask for padding to 10^9 tokens
        tokenizer.no_truncation()
        return tokenizer


def limited(call: Callable[..., Any], problem: str, seconds: int = 5, memory: int = 2 << 30) -> Callable[..., Any]:
    """Returns `call`, a call of a tokenizer, with limits of CPU time and memory, because a user's tokenizer can turn a
    short text into gigabytes. The returned function raises a DataError that begins with `problem` if `call` fails."""
    calls = TimedCalls(tokenizer_errors(problem)(call), seconds, memory)

    def limited_call(*arguments: Any) -> Any:
        try:
            return calls(*arguments)
        except (TimeoutError, ChildProcessError, MemoryError) as error:
            raise DataError(f"{problem}: {str(error) or 'took too much memory'}") from error

    return limited_call


def checked_tokenizer(path: Path) -> bytes:
    """Returns the content of a tokenizer.json. Raises OSError if it cannot be read, ValueError if it is damaged or its
    added tokens are too long, and DataError if the library fails on it or takes too much time or memory."""
    content = read_regular(path, most_bytes=MAX_BYTES)
    tokens = _PARTS.validate_json(content).added_tokens or []
    if (added := sum(len(token.content) for token in tokens)) > MAX_ADDED_BYTES:
        raise ValueError(f"its added_tokens have {added:,} characters, and at most {MAX_ADDED_BYTES:,} are read")
    limited(_load, "the library tokenizers cannot load it", seconds=10)(content)  # regexes can take hours to compile
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
