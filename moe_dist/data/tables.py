"""Reads a user's tables: JSONL files, parquet files, and folders that the package datasets (Hugging Face) saved."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_dist.config.json_text import parse_json, read_json
from moe_dist.config.regular_file import open_regular
from moe_dist.config.timed import TimedCalls
from moe_dist.data.shards import SizedRow, shard_files, shard_rows
from moe_dist.errors import ConfigError, DataError, MoeDistError

MOST_LINE = 1 << 26  # largest number of bytes in a row
_BATCH_ROWS, _BATCH_BYTES = 32, 1 << 24  # a batch of rows ends when it reaches either limit
_BATCH_SECONDS, _BATCH_MEMORY = 5, 4 << 30  # limits of CPU time and memory for reading a batch; usual batches take 20 ms
# Limits for a table whose files have S bytes: _FREE_ROWS + S rows, _FREE_BYTES + _MOST_GROWTH * S characters, and
# _BATCH_SECONDS + S / _LEAST_RATE seconds of CPU time. Usual texts are ten times larger than their compressed files.
_MOST_GROWTH, _FREE_BYTES, _FREE_ROWS, _LEAST_RATE = 1000, 1 << 28, 10_000, 1e6
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
JSON_SUFFIXES, DATASET_SUFFIXES = (".jsonl", ".json"), (".parquet", ".arrow")


def parsed_row(row: bytes | dict[str, Any], where: str, like: str) -> dict[str, Any]:
    """Returns a row that `raw_rows` yields as an object. `like` is an example of a row, for error texts. Raises DataError
    if the row is not a JSON object in UTF-8."""
    if isinstance(row, dict):
        return row
    try:
        line = parse_json(row)
        if _SURROGATE.search(row):
            json.dumps(line, ensure_ascii=False).encode()  # raises an error for an unpaired surrogate
    except ValueError as error:
        named = Path(where.rpartition(", line ")[0]).suffix in JSON_SUFFIXES
        fix, reason = f"write it as {like}" if named else "give plain texts as files of a folder", str(error)
        if isinstance(error, json.JSONDecodeError):
            where, reason = f"{where}, column {error.colno}", error.msg
        raise DataError(f"{where}: is not JSON ({reason}); {fix}") from error
    if not isinstance(line, dict):
        raise DataError(f"{where}: is {type(line).__name__}, not an object")
    return line


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (place for error texts, line) for each line of a file. Omits empty lines. Raises DataError if the file cannot
    be read, or if a line is too long."""
    try:
        stream = open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    with stream:
        for number, text in enumerate(iter(lambda: stream.readline(MOST_LINE + 1), b""), 1):
            if len(text) > MOST_LINE:
                raise DataError(f"{path}, line {number}: has more than {MOST_LINE:,} bytes; write each row on its own line")
            if text.strip():
                yield f"{path}, line {number}", text


def holds_table(path: Path) -> bool:
    """Returns whether `path` is a parquet file, or a folder that contains parquet or arrow files."""
    if path.is_file():
        return path.suffix == ".parquet"
    return any(file.suffix in DATASET_SUFFIXES for file in path.rglob("*"))


def raw_rows(option: str, path: Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yields (place for error texts, row) for each row of a table. A table is a JSONL file, a parquet file, a folder with
    the parquet files of one split, a folder that `Dataset.save_to_disk` wrote, or tar shards. Lines of JSONL are
    not parsed.

    In parquet and arrow files, a struct column has every key in every row. The yielded rows omit keys without a value.

    Args:
        option: Option of the command line that names `path`, for error texts.

    Raises:
        ConfigError: `path` does not exist or has several splits; or the package pyarrow is missing.
        DataError: a file cannot be read.
    """
    if not path.exists():
        raise ConfigError(
            f"{option} {path}: no such file or folder; give a JSONL file, a parquet file or a datasets folder"
        )
    shards = [] if holds_table(path) else shard_files(path)
    if not shards and path.is_file() and path.suffix != ".parquet":
        yield from lines(path)
        return
    try:
        yield from _limited_rows(path, shard_rows(shards) if shards else _table_rows(path, _table_files(option, path)))
    except MoeDistError:
        raise
    except ImportError as error:
        raise ConfigError(f"{option} {path}: needs the package pyarrow; install moe_dist[hf]") from error
    except Exception as error:  # the child sends any error of pyarrow
        why = str(error) or "it needs too much memory"
        raise DataError(f"{option} {path}: cannot be read: {why}; copy or save it again") from error


def _table_files(option: str, path: Path) -> list[Path]:
    import pyarrow.parquet  # noqa: F401 (imported before a child process counts its time)

    if not holds_table(path):
        kinds = ", ".join(DATASET_SUFFIXES)
        raise ConfigError(f"{option} {path}: the folder has no {kinds} or .tar file; give a JSONL file")
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir()))
        raise ConfigError(f"{option} {path}: has the splits {splits}, and one is needed; name one, as {path}/SPLIT")
    if (path / "state.json").is_file():
        return _saved_files(path)
    return [path] if path.is_file() else _parquet_files(option, path)


def _table_rows(path: Path, files: Sequence[Path]) -> Iterator[SizedRow]:
    """Yields the rows of parquet and arrow files. The package datasets would also open files and addresses that the rows
    and the metadata name."""
    from pyarrow import ipc, parquet

    number = 0
    for file in files:
        with open_regular(file) as stream:
            if file.suffix == ".parquet":
                batches = parquet.ParquetFile(stream).iter_batches(_BATCH_ROWS)  # a row group may be large
            else:
                batches = ipc.open_stream(stream)
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):  # an arrow file's batch may have any number of rows
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", _without_nulls(row), len(repr(row))


def _limited_rows(path: Path, rows: Iterator[SizedRow]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the rows in a child process with limits, because a parquet file of 1 KB can hold TB of repeated values."""

    def batch() -> tuple[list[tuple[str, dict[str, Any]]], int, float]:
        found, size = [], 0
        while size < _BATCH_BYTES and len(found) < _BATCH_ROWS and (following := next(rows, None)) is not None:
            *row, length = following
            if length > MOST_LINE:
                raise ValueError(f"a row has {length:,} characters, and at most {MOST_LINE:,} are possible")
            found.append(tuple(row))
            size += length
        return found, size, time.process_time()

    read, number, total = TimedCalls(batch, _BATCH_SECONDS, _BATCH_MEMORY), 0, 0
    stored = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
    most = {
        "rows": _FREE_ROWS + stored,
        "characters": _FREE_BYTES + _MOST_GROWTH * stored,
        "s of CPU time": _BATCH_SECONDS + stored / _LEAST_RATE,
    }
    while (answer := read())[0]:
        number, total = number + len(answer[0]), total + answer[1]
        for (unit, limit), value in zip(most.items(), (number, total, answer[2]), strict=True):
            if value > limit:
                raise ValueError(f"it has more than {limit:,.0f} {unit}, the most for files of {stored:,} bytes")
        yield from answer[0]


def _saved_files(folder: Path) -> list[Path]:
    """Returns the files that state.json of a saved dataset names. Raises ValueError if one is not in the folder."""
    names = [each["filename"] for each in read_json(folder / "state.json", most_bytes=1 << 24)["_data_files"]]
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"state.json names {outside[0]!r:.200}, which is not in the folder")
    return [folder / name for name in names]


def _parquet_files(option: str, folder: Path) -> list[Path]:
    """Returns the parquet files below a folder. On the hub, file names have the form SPLIT-00000-of-00002.parquet."""
    files = sorted(file for file in folder.rglob("*.parquet"))
    splits = sorted({file.stem.partition("-")[0] for file in files})
    if len(splits) != 1:
        found = f"parquet files of {', '.join(splits)}" if splits else "arrow files without state.json"
        raise ConfigError(f"{option} {folder}: has {found}; give a folder with the parquet files of one split, or one file")
    return files


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
