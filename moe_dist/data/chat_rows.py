"""Encodes the rows of a source in several processes, and writes the encoded rows to files, one file per batch of rows.

Only a few batches are in memory. If a command is interrupted, the next call continues after the last batch that has a file.
A chat template or tokenizer may run for ever or take all memory. Time and memory of a batch are therefore limited. If a
batch exceeds a limit, its rows are encoded one by one to find the bad row.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from moe_dist.data.chat import GUIDE, HubTokenizer
from moe_dist.data.corpus import content_family
from moe_dist.data.corpus_files import row_text
from moe_dist.data.picture_coding import Document
from moe_dist.data.picture_files import PictureRef
from moe_dist.data.tables import parsed_row
from moe_dist.errors import ConfigError, DataError

BATCH_SECONDS = 10  # limit of the CPU time of a batch, and of a single row; a usual conversation takes 1 ms
MESSAGES = "messages"  # name of the source that contains conversations
MESSAGES_ROW = '{"messages": [...]}'
_BATCH_ROWS, _BATCH_BYTES = 500, 1 << 19
Row = tuple[str, bytes | dict[str, Any]]  # (place for error texts, row), as from `raw_rows`
Encoded = tuple[str, Sequence[Document], Sequence[str]]  # (family, documents, notes)


@dataclass(frozen=True)
class Part:
    """The encoded rows of one batch: D documents with T tokens in total.

    Attributes:
        lengths_D, tokens_T, prompt_T: The concatenated documents. prompt_T is empty if all tokens are labels.
        families_D: SHA-256 that identifies each document's family, uint8 [D, 32]. A family is on one side of the split.
        bad: Reasons why rows are omitted.
        notes: A pair (warning, place of the row) for each warning.
    """

    lengths_D: np.ndarray
    tokens_T: np.ndarray
    prompt_T: np.ndarray
    families_D: np.ndarray
    bad: Sequence[str] = ()
    notes: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Sequence[PictureRef]] = ()  # of each document; empty if no document has pictures

    def save(self, path: Path) -> None:
        """Writes the part atomically."""
        told = np.frombuffer(json.dumps([self.bad, self.notes, self.pictures]).encode(), np.uint8)
        arrays = {"lengths": self.lengths_D, "tokens": self.tokens_T.astype(np.int32), "families": self.families_D}
        with path.with_suffix(".new").open("wb") as stream:
            np.savez(stream, prompt=np.packbits(self.prompt_T), told=told, **arrays)
        path.with_suffix(".new").replace(path)

    @staticmethod
    def load(path: Path) -> "Part":
        """Reads a file that `save` wrote. Raises DataError if it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                bad, notes, pictures = json.loads(found["told"].tobytes())
                refs = [[PictureRef(*each) for each in document] for document in pictures]
                count = len(found["tokens"]) if len(found["prompt"]) else 0
                prompt_T = np.unpackbits(found["prompt"], count=count).astype(bool)
                notes = [tuple(note) for note in notes]
                return Part(found["lengths"], found["tokens"], prompt_T, found["families"], bad, notes, refs)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise DataError(f"{path}: damaged ({error!r:.100}); remove the folder {path.parent}") from error

    def documents(self, chosen_D: np.ndarray) -> Iterator[Document]:
        """Yields the chosen documents."""
        ends = np.cumsum(self.lengths_D)
        for number in np.flatnonzero(chosen_D).tolist():
            place = slice(int(ends[number] - self.lengths_D[number]), int(ends[number]))
            tokens = self.tokens_T[place].astype(np.int64)
            prompt = self.prompt_T[place] if len(self.prompt_T) else None
            yield Document(tokens, np.zeros(len(tokens), bool), prompt, self.pictures[number] if self.pictures else ())


def encode_conversation(hub: HubTokenizer, row: bytes | dict[str, Any], where: str) -> Encoded:
    """Encodes a row that contains a conversation. Conversations with equal tools, and with equal messages up to the first
    user message, are one family."""
    row = parsed_row(row, where, MESSAGES_ROW)
    found = hub.conversation(row, where)
    roles = [message["role"] for message in row[MESSAGES]]
    asked = row[MESSAGES][: roles.index("user") + 1 if "user" in roles else None]
    return content_family(json.dumps([row.get("tools"), asked], sort_keys=True).encode()), found.documents, found.notes


def encode_text(hub: HubTokenizer, row: bytes | dict[str, Any], where: str) -> Encoded:
    """Encodes a row that contains a text. Equal texts are one family. An empty text gives no document."""
    text = row_text(row, where)
    return content_family(text.encode()), [hub.text(text, where)] if text.strip() else [], ()


def write_parts(
    folder: Path,
    source: str,
    rows: Iterable[Row],
    encode: Callable[..., Encoded],
    hub: HubTokenizer,
    on_part: Callable[[int, Part], None],
    *,
    batch_rows: int | None = None,
    seconds: int | None = None,
) -> list[Path]:
    """Encodes rows, and writes the encoded rows to files in `folder`. Keeps files that an earlier call wrote there.

    Args:
        encode: Function that encodes one row. It is called in other processes.
        on_part: Function that is called with each batch's number of bytes (0 if the rows are objects) and part.
        batch_rows, seconds: Largest number of rows of a batch, and limit of its CPU time. None: the constants above.

    Returns:
        The files, in the order of the rows.
    """
    from moe_dist.config.timed import TimedCalls

    def encoded(batch: Sequence[Row]) -> Part:
        return _encoded(hub, encode, batch)

    children = [TimedCalls(encoded, seconds or BATCH_SECONDS) for _ in range(min(8, len(os.sched_getaffinity(0))))]
    waiting: deque[tuple[TimedCalls, Sequence[Row], Path]] = deque()
    paths: list[Path] = []

    def finish() -> None:
        child, batch, path = waiting.popleft()
        part = _answer(child, batch)
        part.save(path)
        on_part(_size(batch), part)

    for number, batch in enumerate(_batches(rows, batch_rows or _BATCH_ROWS)):
        paths.append(folder / f"{source}.{number:06}.npz")
        if paths[-1].is_file():
            on_part(_size(batch), Part.load(paths[-1]))
            continue
        if len(waiting) == len(children):
            finish()
        children[number % len(children)].send(batch)
        waiting.append((children[number % len(children)], batch, paths[-1]))
    while waiting:
        finish()
    return paths


def _batches(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row[1])
        if size >= _BATCH_BYTES or len(batch) == most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(batch: Sequence[Row]) -> int:
    return sum(len(row) for _, row in batch if isinstance(row, bytes))


def _answer(child: Any, batch: Sequence[Row]) -> Part:
    try:
        return child.receive()
    except (TimeoutError, ChildProcessError, MemoryError) as error:
        parts, ends = [], [time.monotonic()]
        for where, row in batch:
            parts.append(_alone(child, (where, row)))
            ends.append(time.monotonic())
            if ends[-1] - ends[0] > 2 * BATCH_SECONDS:  # each row may be just under the limit of a single row
                took = np.diff(ends)
                found = f"took {took.max():.1f} s, as long as thousands of usual rows,"
                raise _slow(batch[int(took.argmax())][0], found) from error
        return _joined(parts)


def _alone(child: Any, row: Row) -> Part:
    try:
        return child([row])
    except (TimeoutError, ChildProcessError, MemoryError) as error:
        raise _slow(row[0], str(error) or "took too much memory") from error


def _slow(where: str, found: str) -> ConfigError:
    problem = (
        f"{where}: the tokenizer or its chat template {found} on this row; correct the template's loops or its use of "
        "memory, and pass it with --chat-template FILE, or remove the row"
    )
    return ConfigError(problem, see=GUIDE)


def _joined(parts: Sequence[Part]) -> Part:
    return Part(
        lengths_D=np.concatenate([part.lengths_D for part in parts]),
        tokens_T=np.concatenate([part.tokens_T for part in parts]),
        prompt_T=np.concatenate([part.prompt_T for part in parts]),
        families_D=np.concatenate([part.families_D for part in parts]),
        bad=[each for part in parts for each in part.bad],
        notes=[each for part in parts for each in part.notes],
        pictures=[each for part in parts for each in part.pictures],
    )


def _encoded(hub: HubTokenizer, encode: Callable[..., Encoded], batch: Sequence[Row]) -> Part:
    documents: list[Document] = []
    families: list[str] = []
    bad, notes = [], []
    for where, row in batch:
        try:
            family, found, warned = encode(hub, row, where)
        except DataError as error:
            bad.append("; ".join(error.problems))
            continue
        documents += found
        families += [family] * len(found)
        notes += [(note, where) for note in warned]
    prompts = [document.prompt for document in documents if document.prompt is not None]
    return Part(
        np.array([len(document.tokens) for document in documents], np.int64),
        np.concatenate([np.empty(0, np.int64), *(document.tokens for document in documents)]),
        np.concatenate([np.empty(0, bool), *prompts]),
        np.frombuffer(bytes.fromhex("".join(families)), np.uint8).reshape(-1, 32),
        bad,
        notes,
        [document.pictures for document in documents],
    )
