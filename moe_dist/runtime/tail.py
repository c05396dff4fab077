"""The end of a file that may have gigabytes, read backwards."""

from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 16


def lines_from_end(path: Path, *, most_bytes: int) -> Iterator[bytes]:
    """The whole lines of a file, the last first, as far back as `most_bytes`; none where there is no such file.

    A last line without its newline is still being written, or was torn by a crash: it is left out.
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
            lines = (stream.read(size) + rest).split(b"\n")
            rest = lines[0]
            for line in reversed(lines[1:]):
                if not torn:
                    yield line
                torn = False
        if at == 0 and not torn:
            yield rest
