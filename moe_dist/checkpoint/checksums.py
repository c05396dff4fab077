"""SHA256SUMS: digests of a checkpoint's JSON files, in the format of `sha256sum -c SHA256SUMS`. Does not import torch.

Every bit of a checkpoint is checked: SHA256SUMS covers index.json and state.json, the index covers the headers of the
shards (ShardEntry), and fingerprints cover the tensors.
"""

import hashlib
import re
from pathlib import Path

from moe_dist.checkpoint.index import INDEX_FILE, STATE_FILE

CHECKSUMS_FILE = "SHA256SUMS"
CHECKED_FILES = (INDEX_FILE, STATE_FILE)

_MAX_BYTES = 4096


def checksums_of(contents: dict[str, bytes], save_id: str) -> bytes:
    """Content of SHA256SUMS; a comment contains the save id."""
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in CHECKED_FILES]
    return "".join([f"# save {save_id}\n", *lines]).encode()


def read_checksums(folder: Path) -> tuple[str, dict[str, str]] | None:
    """The save id and the digest of each file; None if the file is malformed.

    Raises:
        OSError: the file cannot be read.
    """
    with (folder / CHECKSUMS_FILE).open("rb") as stream:
        text = stream.read(_MAX_BYTES)  # bounds the read: a valid file has about 200 bytes
    pattern = rb"# save ([0-9a-f]+)\n" + b"".join(
        rb"([0-9a-f]{64})  %s\n" % re.escape(name.encode()) for name in CHECKED_FILES
    )
    if (match := re.fullmatch(pattern, text)) is None:
        return None
    save_id, *digests = (group.decode() for group in match.groups())
    return save_id, dict(zip(CHECKED_FILES, digests, strict=True))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # reads in blocks, so a large file needs no memory
