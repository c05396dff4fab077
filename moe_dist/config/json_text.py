"""Reads JSON that another user may have written. Checks a file's size before reading, and its number of values before
parsing."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_dist.config.regular_file import read_regular

# For comparison: the index of a checkpoint with 64 layers x 128 experts has 16 MB.
MAX_LISTS, MAX_VALUES = 1 << 22, 1 << 24


def bounded(raw: bytes, most_lists: int = MAX_LISTS, most_values: int = MAX_VALUES) -> bytes:
    """Returns the JSON text `raw` unchanged. Raises ValueError if the text has more than `most_lists` lists and mappings or
    more than `most_values` values, because parsing such a text would take minutes and many GB."""
    lists, values = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
    if lists > most_lists or values > most_values:
        most = f"{most_lists:,} lists and mappings, and {most_values:,} values"
        raise ValueError(f"{lists:,} lists and mappings, {values:,} values: such a file has at most {most}")
    return raw


def parse_json(raw: bytes, most_lists: int = MAX_LISTS, most_values: int = MAX_VALUES) -> Any:
    """Returns the values of a JSON text. Raises ValueError if the text is no JSON, too large or too deeply nested."""
    try:
        return json.loads(bounded(raw, most_lists, most_values))
    except RecursionError as error:
        raise ValueError("its lists and mappings are nested too deeply") from error


def read_json(path: Path, *, most_bytes: int, links: bool = True) -> Any:
    """Returns the values of a JSON file, which may have at most `most_bytes` bytes, `most_bytes` / 16 lists and
    mappings, and `most_bytes` / 4 values.

    Raises:
        OSError: `read_regular` cannot read the file.
        ValueError: see `parse_json`.
    """
    return parse_json(read_regular(path, most_bytes=most_bytes, links=links), most_bytes >> 4, most_bytes >> 2)


def first_fault(error: ValidationError) -> str:
    """Returns a text with the place of the first fault in a JSON text's values, and the rule that is broken there."""
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]
