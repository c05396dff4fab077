"""Refers to pictures in files or tar shards, which batches decode when they need them.

Two files have the pictures of a split: a line of <prefix>.jsonl has those of one document, and <prefix>.npy, int64 [D, 2],
has the number of bytes of each document's line, 0 without pictures, and the number of patches of its pictures.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_dist.config.regular_file import open_regular
from moe_dist.data.checked_file import CheckedFile
from moe_dist.errors import DataError
from moe_dist.formats.numpy_file import load_array

MOST_PICTURE = 1 << 28  # largest number of bytes of a picture


class PictureRef(NamedTuple):
    """A picture in a file, or in a part of a tar shard.

    Attributes:
        file: Path below the folder of the pictures.
        offset, length: First byte, and number of bytes.
        digest: SHA-256 of the bytes.
        height, width: Size in pixels, turned upright.
        patches: Patches that the encoder reads.
        row: Place of the row that names the picture, for error texts.
    """

    file: str
    offset: int
    length: int
    digest: str
    height: int
    width: int
    patches: int
    row: str


def read_part(folder: Path, file: str, offset: int = 0, length: int | None = None) -> bytes:
    """Reads a part of a file, or all of it. Raises DataError if it cannot be read, or leads out of the folder."""
    path = folder / file
    if length is not None and not 0 <= length <= MOST_PICTURE:
        raise DataError(f"picture {str(path)!r} has {length:,} bytes, not 0 to {MOST_PICTURE:,}; copy it again")
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"picture {file!r} leads out of the folder {folder}; copy it into this folder")
        with open_regular(path) as stream:
            stream.seek(offset)
            found = stream.read(MOST_PICTURE + 1 if length is None else length)
    except (OSError, ValueError, RuntimeError) as error:  # `resolve` raises RuntimeError for a link to itself
        raise DataError(f"picture {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(found) > MOST_PICTURE or len(found) < (length or 0):
        problem = "is cut short" if length is not None else f"has more than {MOST_PICTURE:,} bytes"
        raise DataError(f"picture {str(path)!r} {problem}; copy it again, or remove it")
    return found


def checked_part(folder: Path, ref: PictureRef) -> bytes:
    """Reads a picture again. Raises DataError if it is not the one that was prepared."""
    again = f"picture of {ref.row}; restore it, or prepare the data again"
    try:
        found = read_part(folder, ref.file, ref.offset, ref.length)
    except DataError as error:
        raise DataError([f"{problem} ({again})" for problem in error.problems], see="docs/how-to/pictures.md") from error
    if digest(found) != ref.digest:
        problem = f"picture {str(folder / ref.file)!r} has changed since the data were prepared ({again})"
        raise DataError(problem, see="docs/how-to/pictures.md")
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_refs(folder: Path, prefix: str, pictures_D: Sequence[Sequence[PictureRef]]) -> str | None:
    """Writes the pictures of each document. Returns the prefix, or None if no document has a picture."""
    if not any(pictures_D):
        return None
    counts = np.zeros((len(pictures_D), 2), np.int64)
    with (folder / f"{prefix}.jsonl").open("wb") as stream:
        for document, refs in enumerate(pictures_D):
            if refs:
                counts[document] = stream.write(json.dumps(refs).encode() + b"\n"), sum(ref.patches for ref in refs)
    np.save(folder / f"{prefix}.npy", counts)
    return prefix


class PictureRefs:
    """Gives random access to the pictures of a split's documents.

    Attributes:
        patches_D: Number of patches of each document's pictures, int64.

    Raises:
        DataError, StorageError: the files are damaged, or cannot be read.
    """

    def __init__(self, prefix: Path, documents: int) -> None:
        path = Path(f"{prefix}.npy")
        try:
            counts = load_array(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}; prepare the data again") from error
        self._lines = CheckedFile(f"{prefix}.jsonl")
        if counts.dtype != np.int64 or counts.shape != (documents, 2) or int(counts[:, 0].sum()) != self._lines.size:
            raise DataError(f"{path}: does not fit its .jsonl and {documents} documents; prepare the data again")
        self._bytes_D, self.patches_D = counts[:, 0], counts[:, 1]
        self._ends_D = np.cumsum(self._bytes_D)

    def of(self, document: int) -> Sequence[PictureRef]:
        """Returns the pictures of a document, in the order of its placeholders."""
        count = int(self._bytes_D[document])
        if not count:
            return ()
        line = self._lines.read(int(self._ends_D[document]) - count, count)
        try:
            return [PictureRef(*each) for each in json.loads(line)]
        except (ValueError, TypeError) as error:
            raise DataError(f"{self._lines.path}: damaged at document {document}; prepare the data again") from error


class PictureSource(NamedTuple):
    """Finds the pictures that rows name.

    Attributes:
        folder: Folder of the pictures.
        shard, members: For a row of a shard, its file and the (offset, length) of each file of the row's sample.
    """

    folder: Path
    shard: str = ""
    members: Mapping[str, tuple[int, int]] = {}

    def find(self, name: str) -> tuple[str, int, int | None]:
        """Returns file, offset and number of bytes (None: all) of a picture."""
        if not self.shard:
            return name, 0, None
        named = [each for each in self.members if each == name or each.endswith(f".{name}")]
        if len(named) != 1:
            raise DataError(f"picture {name!r} is not in the row's sample, which has {', '.join(self.members) or 'none'}")
        return self.shard, *self.members[named[0]]
