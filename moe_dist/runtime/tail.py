"""Reads the last lines of a large file."""

from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 16


def lines_from_end(path: Path, *, most_bytes: int) -> Iterator[bytes]:
    """Yields the complete lines in the last `most_bytes` of a file, last first; nothing for a missing file.

    Skips a last line without newline: it is still being written, or a crash cut it.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        at = stream.seek(0, 2)
        begin = max(0, at - most_bytes)
        rest, torn = b"", True
        while at > begin:
            size = min(BLOCK, at - begin)
            at -= size
            stream.seek(at)
            lines = (stream.read(size) + rest).split(b"\n")  # the first line may continue in the previous block
            rest = lines[0]
            for line in reversed(lines[1:]):
                if not torn:
                    yield line
                torn = False
        if at == 0 and not torn:
            yield rest
