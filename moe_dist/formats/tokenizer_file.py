"""Reads tokenizer.json with the library tokenizers, whose Rust code parses the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from moe_dist.config.regular_file import read_regular
from moe_dist.errors import DataError

MAX_BYTES = 1 << 27  # largest size of a tokenizer file; the largest known files have 35 MB


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Reads any tokenizer of the library tokenizers. Raises DataError if the file is missing, too large or damaged."""
    with tokenizer_errors(f"tokenizer {str(path)!r}: must be a tokenizer.json of Hugging Face, or one of prepare-data"):
        return Tokenizer.from_buffer(read_regular(Path(path), most_bytes=MAX_BYTES))


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
